"""The contract between data and model: Example, Document in memory, the shapes of a batch.

Letters: B rows, L tokens of a row, P patches of a row, n tokens and p patches of one document.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

# Values of the field `kinds`.
PAD, TEXT, PATCH, CODE, SLOT, SEPARATOR = range(6)

ROLES = ("", "system", "user", "assistant")  # "" = plain text that is nobody's turn


@dataclasses.dataclass(frozen=True)
class Text:
    """A stretch of text. Consecutive texts of one role are one turn of it."""

    text: str
    role: str = ""  # one of ROLES
    supervised: bool = False  # whether its tokens are targets


@dataclasses.dataclass(frozen=True)
class Image:
    """A picture, or one frame of a video. Raises ValueError if its time is none that can be written."""

    data: bytes  # encoded image file
    timestamp: float | None = None  # seconds from the start of its video

    def __post_init__(self) -> None:
        if self.timestamp is not None and not math.isfinite(self.timestamp * 100):  # hundredths are written
            raise ValueError(f"a frame at {self.timestamp} seconds")


Span = Text | Image


@dataclasses.dataclass(frozen=True)
class Example:
    """One document of any kind: its texts and images in reading order.

    A caption is an image and a text, an interleaved page many of both, a conversation texts with roles, a
    video images with timestamps; a document without images or without text is one too.
    """

    id: str  # unique within its source
    source: str
    spans: tuple[Span, ...]

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(span for span in self.spans if isinstance(span, Image))

    @property
    def texts(self) -> tuple[Text, ...]:
        return tuple(span for span in self.spans if isinstance(span, Text))


class LoadPatches(Protocol):
    """Decodes pictures: uint8 [p, patch_dim], in `out` where the caller has room for them."""

    def __call__(self, out: np.ndarray | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Document:
    """One training sequence before packing: n tokens, p patches.

    Pixels are produced by `load_patches` when a row is laid out: packing, and replaying the stream after a
    restart, handle token counts only.
    """

    name: str  # shown in error messages
    tokens: np.ndarray  # int32 [n]
    kinds: np.ndarray  # int32 [n]
    image_ids: np.ndarray  # int32 [n], 1.. inside the document, 0 = not an image token
    coords: np.ndarray  # float32 [n, 3]: t, h, w
    targets: np.ndarray  # int32 [n], the next token; 0 at the last position
    loss_weights: np.ndarray  # float32 [n], weight of predicting targets[i] at position i
    patch_hw: np.ndarray  # int32 [p, 2]
    load_patches: LoadPatches
    source_id: int = 0
    num_separators: int = 0  # leading tokens that only separate documents: left out where it opens a row


def batch_shapes(
    batch_size: int, row_tokens: int, row_patches: int, patch_dim: int
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns name -> (shape, dtype) of every batch field.

    A stage with the objective distill reads one more, `teacher_features`, float [B, P, C]
    (neo_jax/objectives/distill.py).
    """
    BL = (batch_size, row_tokens)
    BP = (batch_size, row_patches)
    int32, float32, uint8 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint8)
    return {
        "tokens": (BL, int32),
        "kinds": (BL, int32),
        "segment_ids": (BL, int32),
        "image_ids": (BL, int32),
        "coords": ((*BL, 3), float32),
        "targets": (BL, int32),
        "loss_weights": (BL, float32),
        "patch_index": (BL, int32),
        "patches": ((*BP, patch_dim), uint8),
        "patch_hw": ((*BP, 2), int32),
        "source_ids": (BL, int32),
    }
