"""Tokenizer and documents: how pictures, prompts and captions become one token table."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from data_pipelines import schema
from data_pipelines.errors import DataError
from data_pipelines.images import Picture

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
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

    def __init__(self, path: str | Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a readable tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True  # a caption that contains "<img>" stays text
        self.end_of_text = self.special_id(END_OF_TEXT)
        self.im_end = self.special_id(IM_END)
        self.image_context = self.special_id(IMAGE_CONTEXT)
        self.image_start = self.special_id(IMAGE_START)
        self.image_end = self.special_id(IMAGE_END)

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def special_id(self, name: str) -> int:
        """Returns a special token's id. Raises DataError if the vocabulary lacks it."""
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise DataError(f"the tokenizer has no special token {name!r}")
        return token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

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


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document, tokenised on its own, so that its borders are token borders."""

    text: str
    supervised: bool = False
    special: bool = False  # `text` is the name of one special token


IMAGE = Piece("<image>", special=True)  # the next picture: <img>, its <IMG_CONTEXT>s, </img>


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
    parallel: bool = False,
) -> schema.Document:
    """Template "plain": picture, "{locale}: ", caption, <|im_end|>; the last two are supervised.

    Unless `whole`, the document breaks off after the label's line: a prefix of the same text.
    `parallel`: see `build_document`.
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
        parallel=parallel,
    )


def prompt_document(tokenizer: Tokenizer, pictures: Sequence[Picture], prompt: str) -> schema.Document:
    """Every picture, then the prompt, ready to be continued: nothing is supervised and nothing ends it."""
    return build_document(tokenizer, pictures, [IMAGE] * len(pictures) + [Piece(prompt)], name="prompt")


def build_document(
    tokenizer: Tokenizer,
    pictures: Sequence[Picture],
    pieces: Sequence[Piece],
    *,
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
        reduction: "token", "sample" or "square", see `reduction_weight`.
        source_id: index of the data source.
        name: shown in errors.
        parallel: show <|endoftext|> in place of every supervised token, so that each is predicted from the
            pictures and its position alone (CapPa, Tschannen et al. 2023).

    Raises:
        DataError: if the number of pictures is not the number of IMAGE pieces.
    """
    if len(pictures) != pieces.count(IMAGE):
        raise DataError(f"{name}: {len(pictures)} pictures for {pieces.count(IMAGE)} <image> markers")
    remaining = iter(pictures)
    ids: list[int] = []
    supervised: list[bool] = []
    for piece in pieces:
        if piece == IMAGE:
            picture = next(remaining)
            n = picture.rows * picture.cols
            new = [tokenizer.image_start, *[tokenizer.image_context] * n, tokenizer.image_end]
        elif piece.special:
            new = [tokenizer.special_id(piece.text)]
        else:
            new = tokenizer.encode(piece.text)
        ids += new
        supervised += [piece.supervised] * len(new)

    tokens = np.array(ids, np.int32)
    is_patch = tokens == tokenizer.image_context
    grids = [(picture.rows, picture.cols) for picture in pictures]
    patch_hw = grid_coordinates(grids)
    image_ids = np.zeros_like(tokens)
    image_ids[is_patch] = np.repeat(np.arange(1, len(grids) + 1), [rows * cols for rows, cols in grids])
    token_weights = np.array(supervised) * reduction_weight(sum(supervised), reduction)
    return schema.Document(
        name=name,
        tokens=np.where(supervised, tokenizer.end_of_text, tokens).astype(np.int32) if parallel else tokens,
        kinds=np.where(is_patch, schema.PATCH, schema.TEXT).astype(np.int32),
        image_ids=image_ids,
        coords=token_coords(tokens, patch_hw, tokenizer.image_context, tokenizer.image_start),
        targets=np.append(tokens[1:], 0).astype(np.int32),
        loss_weights=np.append(token_weights[1:], 0).astype(np.float32),
        patch_hw=patch_hw,
        load_patches=lambda: np.concatenate([p.load_patches() for p in pictures]),
        source_id=source_id,
    )


def reduction_weight(num_supervised: int, reduction: str) -> float:
    """Weight of each supervised token of a document with n of them: 1, 1/n or 1/sqrt(n); 0 if n = 0."""
    if reduction not in REDUCTION_EXPONENTS:
        raise DataError(f"loss_reduction {reduction!r} is none of {', '.join(REDUCTION_EXPONENTS)}")
    return float(num_supervised) ** -REDUCTION_EXPONENTS[reduction] if num_supervised else 0.0


REDUCTION_EXPONENTS = {"token": 0.0, "square": 0.5, "sample": 1.0}


def grid_coordinates(grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns int32 [p, 2]: row and column of every token of every picture, row-major."""
    parts = [np.stack(np.divmod(np.arange(rows * cols), cols), axis=-1) for rows, cols in grids]
    return np.concatenate([np.zeros((0, 2), int), *parts]).astype(np.int32)


def token_coords(
    tokens: np.ndarray, patch_hw: np.ndarray, image_context: int, image_start: int
) -> np.ndarray:
    """Returns float32 [n, 3]: (t, h, w) of each token of one document.

    t advances by one at every token but the <IMG_CONTEXT>s, and once more right after <img>: all tokens of a
    picture share one t. h and w are 0 outside pictures.
    """
    is_patch = tokens == image_context
    follows_start: np.ndarray = np.append(False, tokens[:-1] == image_start)
    coords: np.ndarray = np.zeros((len(tokens), 3), np.float32)
    coords[:, 0] = np.cumsum(~is_patch + follows_start.astype(int)) - 1
    coords[is_patch, 1:] = patch_hw
    return coords
