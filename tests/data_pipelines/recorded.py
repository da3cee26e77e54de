"""The toy tokenizers, images and resize rules of the recordings in tests/golden, out of their own files."""

import io
import json
import re
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image as PILImage
from safetensors.numpy import load_file
from tokenizers import models, normalizers, pre_tokenizers

from data_pipelines import schema, text
from data_pipelines.schema import Example, Image, Text

ASCII = [chr(code) for code in range(32, 127)]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def character_tokenizer(path: Path, vocabulary: dict[str, int], prefix: str = "") -> text.Tokenizer:
    """One token per character, as all recordings have it; `prefix` begins every text and replaces blanks."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    if prefix:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(prefix), normalizers.Replace(" ", prefix)]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(path))
    return text.Tokenizer(path)


class Recording:
    """A family's folder: its config, its preprocessing, its images and its tokenizer."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.preprocess = load_file(folder / "preprocess.safetensors")
        self.scratch = scratch / "tokenizer.json"

    @property
    def pictures(self) -> list[np.ndarray]:
        """The recorded images, uint8 [h, w, 3]."""
        names = [name for name in self.preprocess if re.fullmatch(r"img\d+\.uint8_hwc", name)]
        return [self.preprocess[f"img{number}.uint8_hwc"] for number in range(len(names))]

    def described_tokenizer(self) -> text.Tokenizer:
        """EVE, EVEv2: read off the sentence in dataset.json."""
        words = json.loads((self.folder / "dataset.json").read_text())["toy_tokenizer"]
        first = int(re.search(r"\bfrom (\d+)", words)[1])
        vocabulary = {char: first + i for i, char in enumerate(ASCII)}
        vocabulary |= {name: int(number) for name, number in re.findall(r"(<\S+?>|newline)=(\d+)", words)}
        vocabulary["\n"] = vocabulary.pop("newline")
        return character_tokenizer(self.scratch, vocabulary)

    def solo_tokenizer(self, packing: dict) -> text.Tokenizer:
        """SOLO: id = 3 + (ord(char)*7) % (no_loss_beyond_token_id - 3)."""
        words = re.fullmatch(
            r"id = (\d+) \+ \(ord\(char\)\*(\d+)\) % \(no_loss_beyond_token_id - (\d+)\).*",
            packing["toy_tokenizer"],
        )
        base, factor, less = map(int, words.groups())
        modulus = packing["no_loss_beyond_token_id"] - less
        vocabulary = {char: base + (ord(char) * factor) % modulus for char in [*ASCII, "\n"]}
        vocabulary |= packing["special"] | {"<s>": packing["bos"], "<unk>": packing["pad"]}
        return character_tokenizer(self.scratch, vocabulary)

    def fuyu_tokenizer(self) -> text.Tokenizer:
        return character_tokenizer(self.scratch, self.config["toy_tokenizer"], prefix="\u2581")

    def norm(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixel mean and deviation on the 0..1 scale."""
        places = [self.config, self.config.get("preprocessor", {}), self.config.get("image_norm", {})]
        found = {key: value for place in places for key, value in place.items()}
        return tuple(
            np.array(found.get(f"image_{key}", found.get(key)), np.float64) for key in ("mean", "std")
        )


def as_uint8(normalised: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Recorded [..., 3] float pixels as the 8-bit values they came from."""
    pixels = (normalised * std + mean) * 255
    rounded = np.rint(pixels)
    np.testing.assert_allclose(pixels, rounded, atol=1e-3)
    return rounded.astype(np.uint8)


def assert_same_pixels(ours: np.ndarray, normalised: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Our uint8 [..., 3] against recorded normalised pixels: exactly as uint8, and within 1e-5 normalised."""
    np.testing.assert_array_equal(ours, as_uint8(normalised, mean, std))
    np.testing.assert_allclose((ours / 255 - mean) / std, normalised, atol=1e-5)


def from_patches(patches: np.ndarray, rows: int, cols: int, side: int) -> np.ndarray:
    """Our [rows * cols, side * side * 3] as an image."""
    return patches.reshape(rows, cols, side, side, 3).swapaxes(1, 2).reshape(rows * side, cols * side, 3)


def conversation(row: dict, images: list[bytes], name: str = "row") -> Example:
    """A LLaVA-style row as an Example: <image> marks the place of the next image while there are any."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    remaining, spans = list(images), []
    for turn in row["conversations"]:
        if turn["from"] not in roles:
            continue
        role = roles[turn["from"]]
        supervised = role == "assistant" and not turn.get("is_input", False)
        rest = turn["value"]
        while remaining and "<image>" in rest:
            before, rest = rest.split("<image>", 1)
            spans += [Text(before, role, supervised)] if before else []
            spans.append(Image(remaining.pop(0)))
        spans += [Text(rest, role, supervised)] if rest else []
    return Example(name, "golden", tuple(spans))


def collapsed(document: schema.Document, placeholder: int, skip: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) with every image as one placeholder and -100 where a token is not supervised."""
    supervised = np.append(False, document.loss_weights[:-1] > 0)
    first = np.diff(document.image_ids, prepend=0) != 0
    keep = (document.image_ids == 0) | first
    in_image = document.image_ids > 0
    ids = np.where(in_image, placeholder, document.tokens)
    labels = np.where(supervised, document.tokens, -100)
    return ids[keep][skip:], labels[keep][skip:]
