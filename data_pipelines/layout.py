"""How a picture's grid of tokens lies in the token table: markers around it, between its rows, before it."""

import dataclasses
import functools
from typing import NamedTuple, Protocol

import numpy as np

from data_pipelines import schema

CLASS_SLOT, ROW_SLOT = 0, 1  # what `tokens` holds at SLOT positions: which learned vector stands there


class Vocabulary(Protocol):
    """What a layout needs of a tokenizer."""

    def special_id(self, name: str) -> int: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order is: start, class slot, then per row its patches and its mark, queries, end.

    Names are of special tokens. start and end are TEXT and do not belong to the image; a row mark out of the
    vocabulary is a SEPARATOR, a learned vector a SLOT, and both belong to it.
    """

    patch: str = ""  # token at PATCH positions, "" = the family has none and `tokens` is 0 there
    start: str = ""
    end: str = ""
    row_mark: str = ""  # token after a row
    row_slot: bool = False  # learned vector after a row
    mark_last: bool = True  # also after the last row
    class_slot: bool = False  # learned vector before the first row
    queries: int = 0  # learned vectors behind the last row, numbered from 0


_NEO = Layout(patch="<IMG_CONTEXT>", start="<img>", end="</img>")
_SOLO = Layout(patch="<vpatch>", start="<vision>", end="</vision>", row_mark="<vrow_sep>", mark_last=False)
_EVE = Layout(row_slot=True, class_slot=True)
LAYOUTS = {
    "neo": _NEO,
    "internvl": _NEO,  # tile after tile, the thumbnail last, inside one pair of markers
    "solo": _SOLO,
    "solo_sft": dataclasses.replace(
        _SOLO, end="<vision>"
    ),  # as released: the image is closed as it was opened
    "sail": Layout(patch="<vpatch>", start="<vision>", end="</vision>"),
    "eve": _EVE,
    "evev2": _EVE,
    "breen": dataclasses.replace(_NEO, queries=144 + 16),
    "fuyu": Layout(patch="|SPEAKER|", row_mark="|NEWLINE|"),
}


class ImageTokens(NamedTuple):
    """The m tokens of one picture. Shared between documents: do not write into it."""

    tokens: np.ndarray  # int32 [m]
    kinds: np.ndarray  # int32 [m]
    grid: np.ndarray  # int32 [m], which grid the position belongs to, 1..; 0 = start and end
    hw: np.ndarray  # int32 [m, 2], row and column in the grid; a row mark's column is the number of columns
    patch_hw: np.ndarray  # int32 [p, 2], the same for the patches alone


def image_tokens(layout: Layout, vocabulary: Vocabulary, rows: int, cols: int, num_grids: int) -> ImageTokens:
    """Lays out `num_grids` grids of rows x cols patches, one after the other.

    Raises DataError if the vocabulary lacks a token of the layout.
    """
    names = (layout.patch, layout.start, layout.end, layout.row_mark)
    return _image_tokens(
        layout, *(vocabulary.special_id(n) if n else None for n in names), rows, cols, num_grids
    )


@functools.lru_cache(maxsize=4096)
def _image_tokens(
    layout: Layout,
    patch: int | None,
    start: int | None,
    end: int | None,
    row_mark: int | None,
    rows: int,
    cols: int,
    num_grids: int,
) -> ImageTokens:
    marked = row_mark is not None or layout.row_slot
    width = cols + marked
    places = np.indices((rows, width)).reshape(2, -1).T
    is_mark = places[:, 1] == cols
    tokens = np.where(is_mark, ROW_SLOT if row_mark is None else row_mark, patch or 0)
    kinds = np.where(is_mark, schema.SLOT if row_mark is None else schema.SEPARATOR, schema.PATCH)
    if marked and not layout.mark_last:
        places, tokens, kinds = places[:-1], tokens[:-1], kinds[:-1]
    grid: np.ndarray = np.repeat(np.arange(1, num_grids + 1), len(tokens))
    places, tokens, kinds = (np.concatenate([x] * num_grids) for x in (places, tokens, kinds))
    patch_hw = places[kinds == schema.PATCH]
    if layout.class_slot:
        places, grid = np.insert(places, 0, 0, axis=0), np.insert(grid, 0, 1)
        tokens, kinds = np.insert(tokens, 0, CLASS_SLOT), np.insert(kinds, 0, schema.SLOT)
    if layout.queries:
        places = np.concatenate([places, np.zeros((layout.queries, 2), int)])
        grid = np.append(grid, [num_grids] * layout.queries)
        tokens = np.append(tokens, np.arange(layout.queries))
        kinds = np.append(kinds, [schema.SLOT] * layout.queries)
    for marker, at in ((start, 0), (end, len(tokens) + (start is not None))):
        if marker is not None:
            places, grid = np.insert(places, at, 0, axis=0), np.insert(grid, at, 0)
            tokens, kinds = np.insert(tokens, at, marker), np.insert(kinds, at, schema.TEXT)
    return ImageTokens(*(x.astype(np.int32) for x in (tokens, kinds, grid, places, patch_hw)))
