"""Packed rows in records: what the offline build writes and the exact, elastic path of training reads.

A record holds one row: the token table, and the image *files* of its documents; pixels are decoded when the
row is read. Rows of 8,192 tokens of photos take 1.7 MB with files, 23.6 MB with uint8 patches, 9.2 MB with
those compressed by zstd. Reading costs four times the CPU of zstd, as much as decoding online does, which is
cheaper than the network that the others would need. Pixels are those of the decoder that is installed.

    msgpack [document names, used tokens n, used patches p, zlib(columns), [[image file, max_pixels], ...]]
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from data_pipelines import pack, schema
from data_pipelines.errors import DataError
from data_pipelines.images import Limits, make_picture
from data_pipelines.resize import Resize
from data_pipelines.schema import Document

_LEVEL = 1  # of zlib: higher ones save 3 % and take three times as long

RowArrays = dict[str, np.ndarray]  # the fields of schema.batch_shapes without their leading B


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What a reader must know of all rows of a folder: `manifest["rows"]`."""

    row_tokens: int
    row_patches: int
    resize: Resize
    limits: Limits

    @property
    def patch_dim(self) -> int:
        return self.resize.side**2 * 3

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists, as in a manifest

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "RowShape":
        """Raises DataError if this is not what `to_json` gave."""
        try:
            resize: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in fields["resize"].items()
            }
            return cls(
                fields["row_tokens"], fields["row_patches"], Resize(**resize), Limits(**fields["limits"])
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the manifest's `rows` are of another version ({error}); build it again"
            ) from error


@dataclasses.dataclass(frozen=True)
class RowImage:
    """An image file, and the upper bound of its pixels after resizing (documents may shrink theirs)."""

    data: bytes
    max_pixels: int


def to_record(documents: Sequence[Document], images: Sequence[RowImage], shape: RowShape) -> bytes:
    """Serialises a row.

    Args:
        documents: the row, in order.
        images: of all its documents, in order.
        shape: the budgets; the row must fit.
    """
    without_pixels = [dataclasses.replace(one, load_patches=_no_pixels) for one in documents]
    batch = pack.stack([without_pixels], 1, shape.row_tokens, shape.row_patches, patch_dim=1)
    n = int((batch["segment_ids"][0] > 0).sum())
    p = sum(len(document.patch_hw) for document in documents)
    columns = b"".join(
        np.ascontiguousarray(batch[name][0][: n if per_token else p]).tobytes()
        for name, _, _, per_token in _columns(n, p)
    )
    return msgpack.packb(
        [
            [document.name for document in documents],
            n,
            p,
            zlib.compress(columns, _LEVEL),
            [[image.data, image.max_pixels] for image in images],
        ]
    )


def ids(record: bytes) -> list[str]:
    """The names of the documents in a row, without decoding anything. Raises DataError if it is none."""
    return _unpack(record)[0]


def from_record(record: bytes, shape: RowShape) -> RowArrays:
    """Reads a row back as arrays; see `fill`."""
    shapes = schema.batch_shapes(1, shape.row_tokens, shape.row_patches, shape.patch_dim)
    row = {name: np.zeros(dims[1:], dtype) for name, (dims, dtype) in shapes.items()}
    row["patch_index"] -= 1
    fill(record, shape, row)
    return row


def fill(record: bytes, shape: RowShape, row: RowArrays) -> None:
    """Writes a row into the arrays of an empty one, its pictures decoded.

    Raises DataError if the record is no row, does not fit the shape, or an image cannot be decoded.
    """
    _, n, p, compressed, images = _unpack(record)
    if n > shape.row_tokens or p > shape.row_patches:
        raise DataError(f"a row of {n} tokens and {p} patches in {shape.row_tokens} and {shape.row_patches}")
    columns, start = zlib.decompress(compressed), 0
    for name, dims, dtype, _ in _columns(n, p):
        values = np.frombuffer(columns, dtype, int(np.prod(dims)), start).reshape(dims)
        row[name][: len(values)] = values
        start += values.nbytes
    pictures = [
        make_picture(data, shape.resize.with_max_pixels(max_pixels), limits=shape.limits)
        for data, max_pixels in images
    ]
    ends = np.cumsum([picture.num_grids * picture.rows * picture.cols for picture in pictures], dtype=int)
    if (found := int(ends.max(initial=0))) != p:
        raise DataError(f"the images of a row have {found} patches instead of {p}: was another version used?")
    for picture, space in zip(pictures, np.split(row["patches"][:p], ends), strict=False):
        picture.load_patches(space)


def _no_pixels(out: np.ndarray | None = None) -> np.ndarray:
    return np.zeros((1, 1), np.uint8)  # for any number of patches


def _columns(n: int, p: int) -> list[tuple[str, tuple[int, ...], np.dtype, bool]]:
    """(name, shape, dtype, whether it is per token) of every field but `patches`, in stored order."""
    shapes = schema.batch_shapes(1, n, p, 1)
    return [
        (name, dims[1:], dtype, name != "patch_hw")
        for name, (dims, dtype) in sorted(shapes.items())
        if name != "patches"
    ]


def _unpack(record: bytes) -> list[Any]:
    try:
        names, n, p, columns, images = msgpack.unpackb(record)
        return [names, n, p, columns, images]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise DataError(f"{len(record)} bytes that are not a packed row: {error}") from error
