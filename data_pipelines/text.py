"""Tokenizer and documents: how pictures and pieces of text become one token table."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data_pipelines import schema
from data_pipelines.errors import DataError
from data_pipelines.images import Picture
from data_pipelines.layout import LAYOUTS, ImageTokens, image_tokens
from data_pipelines.positions import POSITIONS
from data_pipelines.template import IM_END, IM_START, IMAGE, Piece

END_OF_TEXT = "<|endoftext|>"
_SHORT, _MAX_SHORT = 24, 4096  # characters of a text whose ids are kept, how many such texts
IMAGE_CONTEXT, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    IMAGE_CONTEXT,
    IMAGE_START,
    IMAGE_END,
)  # ids 0.. in this order


class Tokenizer:
    """A `tokenizer.json`. Special tokens are looked up by name and never arise from plain text."""

    def __init__(self, path: str | Path, special_tokens: Sequence[str] = ()):
        """`special_tokens`: names that are appended, in order, where the vocabulary lacks them."""
        try:
            content = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a readable tokenizer.json: {error}") from error
        self._read(content, str(path))
        new = [name for name in special_tokens if self._tokenizer.token_to_id(name) is None]
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in new])

    @classmethod
    def from_json(cls, content: str) -> "Tokenizer":
        """From the content of a tokenizer.json."""
        tokenizer = cls.__new__(cls)
        tokenizer._read(content, "tokenizer")
        return tokenizer

    def _read(self, content: str, name: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name}: not a readable tokenizer.json: {error}") from error
        self._prepare()

    def _prepare(self) -> None:
        self._tokenizer.encode_special_tokens = True  # a caption that contains "<img>" stays text
        self._short: dict[str, list[int]] = {}  # ids of texts that templates repeat

    def __getstate__(self) -> tokenizers.Tokenizer:
        return self._tokenizer

    def __setstate__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prepare()  # the library's own pickle forgets its setting

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    # The tokens of the layout "neo"; other families have others.
    @property
    def end_of_text(self) -> int:
        return self.special_id(END_OF_TEXT)

    @property
    def im_end(self) -> int:
        return self.special_id(IM_END)

    @property
    def image_context(self) -> int:
        return self.special_id(IMAGE_CONTEXT)

    @property
    def image_start(self) -> int:
        return self.special_id(IMAGE_START)

    @property
    def image_end(self) -> int:
        return self.special_id(IMAGE_END)

    def to_json(self) -> str:
        """The `tokenizer.json` of this vocabulary, appended tokens included."""
        return self._tokenizer.to_str(pretty=True)

    def special_id(self, name: str) -> int:
        """Returns a special token's id. Raises DataError if the vocabulary lacks it."""
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise DataError(f"the tokenizer has no special token {name!r}")
        return token_id

    @property
    def special_tokens(self) -> dict[int, str]:
        """id -> name of the tokens that never arise from plain text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {id_: token.content for id_, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        if len(text) > _SHORT:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        if text not in self._short:
            if len(self._short) >= _MAX_SHORT:
                self._short.clear()
            self._short[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return list(self._short[text])

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Returns ids and, for each, the index in `text` behind its last character."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Trains a byte-level BPE and returns its `tokenizer.json`. Equal texts give equal bytes."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)


def prompt_text(locale: str) -> str:
    """The unsupervised text between a picture and its caption."""
    return f"{locale}: "


def caption_pieces(label: str, tags: Sequence[str]) -> list[str]:
    """The supervised text: the label's line, then the tags (no second piece without tags)."""
    return [f"{label}\n", ", ".join(tags)] if tags else [f"{label}\n"]


def caption_document(
    tokenizer: Tokenizer,
    picture: Picture,
    locale: str,
    label: str,
    tags: Sequence[str],
    *,
    reduction: str = "token",
    source_id: int = 0,
    name: str = "document",
    whole: bool = True,
    **rules: Any,
) -> schema.Document:
    """Template "plain": picture, "{locale}: ", caption, <|im_end|>; the last two are supervised.

    Unless `whole`, the document breaks off after the label's line: a prefix of the same text.
    `rules`: see `build_document`.
    """
    texts = caption_pieces(label, tags)
    pieces = [IMAGE, Piece(prompt_text(locale))]
    pieces += [Piece(text, supervised=True) for text in (texts if whole else texts[:1])]
    if whole:
        pieces.append(Piece(IM_END, supervised=True, special=True))
    return build_document(
        tokenizer,
        [picture],
        pieces,
        reduction=reduction,
        source_id=source_id,
        name=name,
        **rules,
    )


def prompt_document(
    tokenizer: Tokenizer, pictures: Sequence[Picture], prompt: str, **rules: Any
) -> schema.Document:
    """Every picture, then the prompt, ready to be continued: nothing is supervised and nothing ends it."""
    pieces = [IMAGE] * len(pictures) + [Piece(prompt)]
    return build_document(tokenizer, pictures, pieces, name="prompt", **rules)


def build_document(
    tokenizer: Tokenizer,
    pictures: Sequence[Picture],
    pieces: Sequence[Piece],
    *,
    layout: str = "neo",
    coords: str = "thw",
    delta: float = 1.0,
    reduction: str = "token",
    source_id: int = 0,
    name: str = "document",
    parallel: bool = False,
) -> schema.Document:
    """Lays pieces and pictures out as one token table.

    Args:
        tokenizer: gives all ids.
        pictures: one per IMAGE piece, in order.
        pieces: the document's text and markers.
        layout: how a picture lies in the table, one of LAYOUTS.
        coords, delta: how positions are counted, one of POSITIONS, and the step of "v2pe".
        reduction: "token", "sample" or "square", see `reduction_weight`.
        source_id: index of the data source.
        name: shown in errors.
        parallel: show <|endoftext|> in place of every supervised token, so that each is predicted from the
            pictures and its position alone (CapPa, Tschannen et al. 2023).

    Raises:
        DataError: if there are not as many pictures as IMAGE pieces, or the vocabulary lacks a token.
    """
    if len(pictures) != pieces.count(IMAGE):
        raise DataError(f"{name}: {len(pictures)} pictures for {pieces.count(IMAGE)} <image> markers")
    groups: list[tuple[np.ndarray | list[int], np.ndarray | bool, ImageTokens | None]] = []
    remaining = iter(pictures)
    for group in _groups(pieces):
        if group[0] == IMAGE:
            picture = next(remaining)
            image = image_tokens(LAYOUTS[layout], tokenizer, picture.rows, picture.cols, picture.num_grids)
            groups.append((image.tokens, False, image))
        else:
            groups.append((*_encode(tokenizer, group), None))

    n = sum(len(ids) for ids, *_ in groups)
    tokens: np.ndarray = np.empty(n, np.int32)
    kinds: np.ndarray = np.empty(n, np.int32)
    kinds.fill(schema.TEXT)
    image_ids: np.ndarray = np.zeros(n, np.int32)
    hw: np.ndarray = np.zeros((n, 2), np.int32)
    supervised: np.ndarray = np.zeros(n, bool)
    patch_hw: list[np.ndarray] = [np.zeros((0, 2), np.int32)]
    start = num_grids = 0
    for ids, learnt, laid_out in groups:
        span = slice(start, start + len(ids))
        tokens[span], supervised[span] = ids, learnt
        if laid_out is not None:
            kinds[span], hw[span] = laid_out.kinds, laid_out.hw
            image_ids[span] = laid_out.grid + num_grids * (laid_out.grid > 0)
            num_grids += int(laid_out.grid.max(initial=0))
            patch_hw.append(laid_out.patch_hw)
        start = span.stop
    weight = np.float32(reduction_weight(int(np.count_nonzero(supervised)), reduction))
    shown = np.where(supervised, tokenizer.end_of_text, tokens).astype(np.int32) if parallel else tokens
    return schema.Document(
        name=name,
        tokens=shown,
        kinds=kinds,
        image_ids=image_ids,
        coords=POSITIONS[coords](image_ids, hw, delta),
        targets=_next(tokens),
        loss_weights=_next(supervised * weight),
        patch_hw=np.concatenate(patch_hw),
        load_patches=pictures[0].load_patches if len(pictures) == 1 else _load_all(pictures),
        source_id=source_id,
        num_separators=sum(piece.separator for piece in pieces),
    )


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are tokenised in one go, in order."""
    group: list[Piece] = []
    for piece in pieces:
        if group and not (piece.joined and not group[-1].special):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _encode(tokenizer: Tokenizer, group: Sequence[Piece]) -> tuple[list[int], np.ndarray | bool]:
    """Ids of pieces that belong together, and which of them are supervised."""
    first = group[0]
    if len(group) == 1:
        ids = [tokenizer.special_id(first.text)] if first.special else tokenizer.encode(first.text)
        return ids, first.supervised
    ids, ends = tokenizer.encode_with_ends("".join(piece.text for piece in group))
    borders = np.cumsum([len(piece.text) for piece in group])
    piece_of = np.minimum(np.searchsorted(borders, ends), len(group) - 1)
    return ids, np.array([piece.supervised for piece in group])[piece_of]


def _next(values: np.ndarray) -> np.ndarray:
    """values[i + 1] at every i, 0 at the last."""
    shifted: np.ndarray = np.empty_like(values)
    shifted[:-1], shifted[-1:] = values[1:], 0
    return shifted


def _load_all(pictures: Sequence[Picture]) -> schema.LoadPatches:
    def load_patches(out: np.ndarray | None = None) -> np.ndarray:
        return np.concatenate([picture.load_patches() for picture in pictures], out=out)

    return load_patches


def reduction_weight(num_supervised: int, reduction: str) -> float:
    """Weight of each supervised token of a document with n of them: 1, 1/n or 1/sqrt(n); 0 if n = 0."""
    if reduction not in REDUCTION_EXPONENTS:
        raise DataError(f"loss_reduction {reduction!r} is none of {', '.join(REDUCTION_EXPONENTS)}")
    return float(num_supervised) ** -REDUCTION_EXPONENTS[reduction] if num_supervised else 0.0


REDUCTION_EXPONENTS = {"token": 0.0, "square": 0.5, "sample": 1.0}
