"""Packing documents into rows with two budgets, tokens and patches, and rows into a batch."""

from collections.abc import Sequence

import numpy as np

from data_pipelines import schema
from data_pipelines.errors import DataError
from data_pipelines.schema import Document

Row = list[Document]


def check_fits(name: str, num_tokens: int, num_patches: int, row_tokens: int, row_patches: int) -> None:
    """Raises DataError if a document of that size exceeds a row's budget even alone."""
    for size, budget, noun, field in (
        (num_tokens, row_tokens, "tokens", "row_tokens"),
        (num_patches, row_patches, "image tokens", "row_patches"),
    ):
        if size > budget:
            raise DataError(f"{name}: {size} {noun} exceed {field}={budget}; raise it or lower max_pixels")


def pack_rows(documents: Sequence[Document], row_tokens: int, row_patches: int) -> list[Row]:
    """Puts each document, in order, into the fullest row with room for it, else into a new row.

    Every document ends up in exactly one row. Raises DataError if one exceeds a budget.
    """
    budgets = np.array([row_tokens, row_patches])
    rows: list[Row] = []
    used: np.ndarray = np.zeros((len(documents), 2), int)  # one line per row, at most one row per document
    for document in documents:
        size = (len(document.tokens), len(document.patch_hw))
        check_fits(document.name, *size, row_tokens, row_patches)
        fits = np.flatnonzero((used[: len(rows)] + size <= budgets).all(axis=1))
        if len(fits):
            best = fits[np.argmax(used[fits].sum(axis=1))]
        else:
            best = len(rows)
            rows.append([])
        rows[best].append(document)
        used[best] += size
    return rows


def stack(
    rows: Sequence[Row], batch_size: int, row_tokens: int, row_patches: int, patch_dim: int
) -> dict[str, np.ndarray]:
    """Lays rows out as one batch (fields: `schema.batch_shapes`), padded with empty rows."""
    if len(rows) > batch_size:
        raise ValueError(f"{len(rows)} rows in a batch of {batch_size}")
    shapes = schema.batch_shapes(batch_size, row_tokens, row_patches, patch_dim)
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    batch["patch_index"] -= 1
    for b, row in enumerate(rows):
        _fill_row({name: array[b] for name, array in batch.items()}, row)
    return batch


def _fill_row(arrays: dict[str, np.ndarray], row: Row) -> None:
    """Writes documents one after the other; document, image and patch numbers count through the row."""
    token, patch, image = 0, 0, 0
    for segment, document in enumerate(row, start=1):
        skip = document.num_separators if segment == 1 else 0
        n, p = len(document.tokens) - skip, len(document.patch_hw)
        span, patch_span = slice(token, token + n), slice(patch, patch + p)
        for name in ("tokens", "kinds", "targets", "loss_weights"):
            arrays[name][span] = getattr(document, name)[skip:]
        arrays["coords"][span] = document.coords[skip:] - document.coords[skip:][:1] * (skip > 0)
        is_patch, image_ids = document.kinds[skip:] == schema.PATCH, document.image_ids[skip:]
        arrays["segment_ids"][span] = segment
        arrays["source_ids"][span] = document.source_id
        arrays["image_ids"][span] = np.where(image_ids > 0, image_ids + image, 0)
        arrays["patch_index"][span] = np.where(is_patch, patch + np.cumsum(is_patch) - 1, -1)
        arrays["patch_hw"][patch_span] = document.patch_hw
        if p:
            arrays["patches"][patch_span] = document.load_patches()
        token, patch = token + n, patch + p
        image += int(document.image_ids.max(initial=0))
