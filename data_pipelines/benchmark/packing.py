"""How full rows are: two-budget packing, a naive batch, and NEO's flatten-and-drop, on the same documents."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines import pack
from data_pipelines.schema import Document

NAIVE_BATCH = 8  # documents padded to the longest of them
FLATTENED = 64  # documents that NEO concatenates to one row: its batch per device


@dataclasses.dataclass(frozen=True)
class Filled:
    """Shares of what rows hold that is used, and what became of the documents."""

    tokens: float  # used tokens over those that rows have room for
    patches: float
    rows: int
    lost: int  # documents that are in no row, or not whole


def patch_budget(documents: Sequence[Document], row_tokens: int) -> int:
    """A row's budget of patches, set from the data: the least, in whole 128s, that costs no row fullness.

    From the documents' mean share of patches upwards, until rows are as full as without that budget, to
    within 0.2 % of their tokens.
    """
    patches = [len(document.patch_hw) for document in documents]
    if not any(patches):
        return 0
    share = sum(patches) / sum(len(document.tokens) for document in documents)
    free = two_budgets(documents, row_tokens, row_tokens).tokens
    budget = -(-max(int(share * row_tokens), *patches) // 128) * 128
    while budget < row_tokens and two_budgets(documents, row_tokens, budget).tokens < free - 0.002:
        budget += 128
    return min(budget, row_tokens)


def pack_rows(documents: Sequence[Document], row_tokens: int, row_patches: int) -> list[pack.Row]:
    """The library's packing."""
    return pack.pack_rows(documents, pack.row_budgets(row_tokens, row_patches))


def two_budgets(documents: Sequence[Document], row_tokens: int, row_patches: int) -> Filled:
    """The library's packing of all documents; none is left out."""
    rows = pack_rows(documents, row_tokens, row_patches)
    names = sorted(document.name for row in rows for document in row)
    if names != sorted(document.name for document in documents):
        raise AssertionError("packing lost or doubled a document")
    return _filled(documents, len(rows), row_tokens, row_patches)


def naive(documents: Sequence[Document], row_tokens: int, row_patches: int) -> Filled:
    """Batches of NAIVE_BATCH documents in order, each padded to the longest document of its batch."""
    tokens = patches = 0
    for start in range(0, len(documents), NAIVE_BATCH):
        part = documents[start : start + NAIVE_BATCH]
        tokens += len(part) * max(len(document.tokens) for document in part)
        patches += len(part) * max(len(document.patch_hw) for document in part)
    used = sum(len(document.tokens) for document in documents)
    used_patches = sum(len(document.patch_hw) for document in documents)
    return Filled(used / tokens, used_patches / patches, len(documents), 0)


def flatten_and_drop(documents: Sequence[Document], row_tokens: int, row_patches: int) -> Filled:
    """As NEO's released scripts train: a batch of FLATTENED documents is one row, in order.

    From the document that crosses the row's end on, all documents of the batch are dropped.
    """
    kept: list[Document] = []
    num_rows = 0
    for start in range(0, len(documents), FLATTENED):
        part = documents[start : start + FLATTENED]
        ends = np.cumsum([len(document.tokens) for document in part])
        kept += part[: int((ends <= row_tokens).sum())]
        num_rows += 1
    return dataclasses.replace(
        _filled(kept, num_rows, row_tokens, row_patches), lost=len(documents) - len(kept)
    )


def _filled(documents: Sequence[Document], num_rows: int, row_tokens: int, row_patches: int) -> Filled:
    tokens = sum(len(document.tokens) for document in documents)
    patches = sum(len(document.patch_hw) for document in documents)
    return Filled(tokens / (num_rows * row_tokens), patches / (num_rows * row_patches), num_rows, 0)
