"""The contract between data and model: Example on disk, Document in memory, the shapes of a batch.

Letters: B rows, L tokens of a row, P patches of a row, n tokens and p patches of one document.
"""

import dataclasses
from collections.abc import Callable, Mapping

import msgpack
import numpy as np

from data_pipelines.errors import DataError

# Values of the field `kinds`.
PAD, TEXT, PATCH, CODE, SLOT, SEPARATOR = range(6)

Caption = tuple[str, tuple[str, ...]]  # label, tags


@dataclasses.dataclass(frozen=True)
class Example:
    """One image and its captions, as stored in a record."""

    id: str  # "source/concept"
    source: str
    concept: str  # lower-case codepoints joined by "-"
    image: bytes  # encoded image file, RGBA
    captions: Mapping[str, Caption]  # by locale

    def to_bytes(self) -> bytes:
        """Serialises to msgpack; equal examples give equal bytes."""
        captions = {k: [label, list(tags)] for k, (label, tags) in sorted(self.captions.items())}
        return msgpack.packb([self.id, self.source, self.concept, self.image, captions])

    @classmethod
    def from_bytes(cls, record: bytes) -> "Example":
        """Reads a record back. Raises DataError if it is no Example."""
        try:
            id_, source, concept, image, captions = msgpack.unpackb(record)
            captions = {locale: (label, tuple(tags)) for locale, (label, tags) in captions.items()}
        except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
            raise DataError(f"a record of {len(record)} bytes is not an Example: {error}") from error
        return cls(id_, source, concept, image, captions)


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
    load_patches: Callable[[], np.ndarray]  # -> uint8 [p, patch_dim]
    source_id: int = 0


def batch_shapes(
    batch_size: int, row_tokens: int, row_patches: int, patch_dim: int
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns name -> (shape, dtype) of every batch field."""
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
