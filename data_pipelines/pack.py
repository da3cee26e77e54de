"""Packing documents into rows under any number of budgets, and rows into a batch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines import schema
from data_pipelines.errors import Reject
from data_pipelines.schema import Document

Row = list[Document]
Budgets = Mapping[str, int]  # what a row holds at most of: keys of `sizes`

_LIMITS = {
    "tokens": ("too_long", "tokens", "row_tokens"),
    "patches": ("too_many_patches", "image tokens", "row_patches"),
    "text": ("too_long", "text tokens", "the text side of visual_share"),
    "visual": ("too_many_patches", "visual tokens", "the visual side of visual_share"),
}


def row_budgets(row_tokens: int, row_patches: int, visual_share: float = 0.0) -> Budgets:
    """The budgets of a row. With a visual share (config.model.route) text and visual tokens have one each."""
    budgets = {"tokens": row_tokens, "patches": row_patches}
    if visual_share:
        budgets["visual"] = round(row_tokens * visual_share)
        budgets["text"] = row_tokens - budgets["visual"]
    return budgets


def sizes(document: Document) -> dict[str, int]:
    """How much a document takes of each budget."""
    kinds = document.kinds
    visual = int(np.count_nonzero((kinds == schema.PATCH) | (kinds == schema.SLOT)))
    tokens = len(document.tokens)
    return {"tokens": tokens, "patches": len(document.patch_hw), "visual": visual, "text": tokens - visual}


def check_fits(name: str, sizes: Mapping[str, int], budgets: Budgets) -> None:
    """Raises Reject if a document of these sizes exceeds a row's budget even alone."""
    for key, budget in budgets.items():
        if sizes[key] > budget:
            reason, noun, field = _LIMITS[key]
            raise Reject(
                reason, f"{name}: {sizes[key]} {noun} exceed {field}={budget}; raise it or lower max_pixels"
            )


def pack_rows(documents: Sequence[Document], budgets: Budgets) -> list[Row]:
    """Packs documents into few rows, see `assign`. Raises Reject if one exceeds a budget by itself."""
    wanted = []
    for document in documents:
        size = sizes(document)
        check_fits(document.name, size, budgets)
        wanted.append([size[key] for key in budgets])
    return [[documents[i] for i in row] for row in assign(wanted, list(budgets.values()))]


def assign(sizes: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[list[int]]:
    """Best fit decreasing, see Packer; returns the items of each row, every item in exactly one."""
    packer = Packer(budgets)
    packer.fill(sizes)
    return packer.rows


class Packer:
    """Rows of items that have a size in each of k budgets; knows sizes only.

    Attributes:
        rows: the numbers of each row's items, in order of arrival.
    """

    def __init__(self, budgets: Sequence[int]):
        self._budgets = np.array(budgets)
        # Room in the rows, and in some that are not in use yet.
        self._free: np.ndarray = np.zeros((0, len(budgets)), int)
        self.rows: list[list[int]] = []
        self._items = 0

    def fill(self, sizes: Sequence[Sequence[int]]) -> None:
        """Best fit decreasing: from the largest item to the smallest, each into the fullest row with room.

        Args:
            sizes: int [n, k], each at most the budgets.
        """
        wanted: np.ndarray = np.array(sizes, int).reshape(-1, len(self._budgets))
        self._free = np.concatenate([self._free[: len(self.rows)], np.tile(self._budgets, (len(wanted), 1))])
        for i in np.argsort(-(wanted / self._budgets).max(axis=1), kind="stable").tolist():
            row = self._best(wanted[i])
            if row is None:
                row = len(self.rows)
                self.rows.append([])
            self.rows[row].append(self._items + i)
            self._free[row] -= wanted[i]
        self._items += len(wanted)

    def top_up(self, sizes: Sequence[Sequence[int]]) -> bool:
        """Puts items [n, k] into the room that is left; all of them, or none and returns False."""
        before = self._free.copy()
        chosen = []
        for size in np.array(sizes, int):
            row = self._best(size)
            if row is None:
                self._free = before
                return False
            self._free[row] -= size
            chosen.append(row)
        for row in chosen:
            self.rows[row].append(self._items)
            self._items += 1
        return True

    def _best(self, size: np.ndarray) -> int | None:
        """The fullest row with room for an item, the first of equals."""
        room = self._free[: len(self.rows)]
        fits = np.flatnonzero((room >= size).all(axis=1))
        return int(fits[(room[fits] / self._budgets).sum(axis=1).argmin()]) if len(fits) else None


class Dropped(NamedTuple):
    """A document whose pixels could not be decoded when its row was laid out."""

    document: Document
    reject: Reject


def stack(
    rows: Sequence[Row],
    batch_size: int,
    row_tokens: int,
    row_patches: int,
    patch_dim: int,
    dropped: list[Dropped] | None = None,
) -> dict[str, np.ndarray]:
    """Lays rows out as one batch (fields: `schema.batch_shapes`), padded with empty rows.

    Args:
        rows: at most `batch_size`.
        dropped: takes the documents whose image turns out to be damaged: they are left out of their rows, the
            others stay as they are. None: the first such image raises its Reject.
    """
    if len(rows) > batch_size:
        raise ValueError(f"{len(rows)} rows in a batch of {batch_size}")
    shapes = schema.batch_shapes(batch_size, row_tokens, row_patches, patch_dim)
    batch = {
        # Most of a batch's bytes are patches, most of which are written: only the rest is set to 0.
        name: np.empty(shape, dtype) if name == "patches" else np.zeros(shape, dtype)
        for name, (shape, dtype) in shapes.items()
    }
    batch["patch_index"] -= 1
    for b, row in enumerate(rows):
        used = _fill_row({name: array[b] for name, array in batch.items()}, row, dropped)
        batch["patches"][b, used:] = 0
    batch["patches"][len(rows) :] = 0
    return batch


def _fill_row(arrays: dict[str, np.ndarray], row: Row, dropped: list[Dropped] | None) -> int:
    """Writes documents into an empty row, one after the other.

    Document, image and patch numbers count through the row. Returns the number of patches written.
    """
    token, patch, image, segment = 0, 0, 0, 0
    for document in row:
        skip = document.num_separators if segment == 0 else 0
        n, p = len(document.tokens) - skip, len(document.patch_hw)
        span, patch_span = slice(token, token + n), slice(patch, patch + p)
        if p:
            try:
                space = arrays["patches"][patch_span]
                space[...] = document.load_patches(space)  # nothing is copied where they lie there already
            except Reject as reject:
                if dropped is None:
                    raise
                dropped.append(Dropped(document, reject))
                continue
        segment += 1
        for name in ("tokens", "kinds", "targets", "loss_weights"):
            arrays[name][span] = getattr(document, name)[skip:]
        coords = document.coords[skip:]
        arrays["coords"][span] = coords - coords[:1] if skip else coords
        image_ids = document.image_ids[skip:]
        arrays["segment_ids"][span] = segment
        arrays["source_ids"][span] = document.source_id
        arrays["image_ids"][span] = image_ids + image * (image_ids > 0)
        arrays["patch_index"][span][document.kinds[skip:] == schema.PATCH] = np.arange(patch, patch + p)
        arrays["patch_hw"][patch_span] = document.patch_hw
        token, patch = token + n, patch + p
        image += int(document.image_ids.max(initial=0))
    return patch
