"""The endless stream of packed rows, cut into lanes and windows so that it can be taken up anywhere.

A **lane** is a stream of its own: lane g of G takes every G-th document of each source's shuffled sequence. A
batch of B rows holds B / G rows of every lane, so processes that read different lanes need not know of each
other.

A **window** is what a lane packs at once: its next W records become documents, these rows, further documents
fill up the last row, and the rows are shuffled. They depend on nothing but where the lane is at the start of
the window, a handful of numbers:

    rows    rows that the lane gave before this window (tells the step, and with it the mixture's weights)
    drawn   documents taken from each source before this window
    credit  what each source is owed, see mix.deal
    row     rows of this window already given

This is the whole position. It does not mention processes; going on from it reads one window per lane.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import mix, pack
from data_pipelines.errors import DataError, Reject
from data_pipelines.mix import Mixture
from data_pipelines.pack import Budgets
from data_pipelines.rejects import Rejected
from data_pipelines.schema import Document
from data_pipelines.shuffle import Order
from data_pipelines.sources import Source

# Raw record, its id, generator of this document's random choices -> documents that fit a row; raises Reject.
Make = Callable[[Any, str, np.random.Generator], list[Document]]


@dataclasses.dataclass(frozen=True)
class Feed:
    """A source as the stream takes it."""

    source: Source
    order: Order
    make: Make


@dataclasses.dataclass(frozen=True)
class LaneState:
    """Where a lane is; see the module."""

    rows: int
    drawn: tuple[int, ...]
    credit: tuple[float, ...]
    row: int = 0

    def to_json(self) -> list[Any]:
        return [self.rows, list(self.drawn), list(self.credit), self.row]

    @classmethod
    def from_json(cls, value: Any) -> "LaneState":
        """Raises DataError if it is no position."""
        try:
            rows, drawn, credit, row = value
            return cls(int(rows), tuple(map(int, drawn)), tuple(map(float, credit)), int(row))
        except (TypeError, ValueError) as error:
            raise DataError(f"not a position in the data: {value!r}") from error


class Placed(NamedTuple):
    """A document of a row, and where it came from."""

    document: Document
    source: Source
    record: int


@dataclasses.dataclass(frozen=True)
class Window:
    """The rows of a window, what was rejected on the way, and the state at the start of the next one."""

    rows: list[list[Placed]]
    rejects: list[Rejected]
    following: LaneState


class Planner:
    """Makes windows: a pure function of lane and state.

    Args:
        feeds: sources in the order of the mixture's names.
        mixture: their weights by step.
        budgets: of a row.
        seed: of everything random.
        lanes: G.
        window: W, records that a lane packs at once.
        lane_rows: rows of one lane in a batch, B / G.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        mixture: Mixture,
        budgets: Budgets,
        *,
        seed: int,
        lanes: int,
        window: int,
        lane_rows: int,
        shuffle: bool,
    ):
        self._feeds, self._mixture, self._budgets = feeds, mixture, budgets
        self._seed, self._lanes, self._window = seed, lanes, window
        self._lane_rows, self._shuffle = lane_rows, shuffle

    def start(self) -> LaneState:
        """Where every lane begins."""
        return LaneState(0, (0,) * len(self._feeds), (0.0,) * len(self._feeds))

    def plan(self, lane: int, state: LaneState) -> Window:
        """Reads and packs the window at `state`.

        Raises DataError if a shard cannot be read, or not one record of the window can be used.
        """
        shares = self._mixture.at(state.rows // self._lane_rows)
        turns, credit = mix.deal(shares, np.array(state.credit), self._window)
        drawn = list(state.drawn)
        documents: list[Placed] = []
        rejects: list[Rejected] = []
        for number in turns.tolist():
            self._draw(lane, number, drawn[number], documents, rejects)
            drawn[number] += 1
        if not documents:
            raise DataError(
                f"none of {self._window} records in a row can be used; the last was {rejects[-1]}"
            )
        packer = pack.Packer(list(self._budgets.values()))
        packer.fill(self._sizes(documents))
        # The last row is hardly ever full: what comes next goes there, until it does not fit.
        for _ in range(self._window):
            (number,), next_credit = mix.deal(shares, credit, 1)
            more: list[Placed] = []
            found: list[Rejected] = []
            self._draw(lane, number, drawn[number], more, found)
            if not packer.top_up(self._sizes(more)):
                break
            drawn[number] += 1
            credit = next_credit
            documents += more
            rejects += found
        rows = [[documents[i] for i in row] for row in packer.rows]
        if self._shuffle:  # packing starts with the largest documents
            order = np.random.default_rng([self._seed, 1, lane, state.rows]).permutation(len(rows))
            rows = [rows[i] for i in order]
        following = LaneState(state.rows + len(rows), tuple(drawn), tuple(credit.tolist()))
        return Window(rows, rejects, following)

    def _draw(
        self, lane: int, number: int, drawn: int, documents: list[Placed], rejects: list[Rejected]
    ) -> None:
        """Reads the next record that a lane takes from feed `number`, after `drawn` others."""
        feed, place = self._feeds[number], drawn * self._lanes + lane
        record = feed.order(place)
        rng = np.random.default_rng([self._seed, 0, number, place])
        try:
            made = feed.make(feed.source[record], feed.source.id_of(record), rng)
        except Reject as reject:
            rejects.append(rejected(feed.source, record, reject))
        else:
            documents += [Placed(document, feed.source, record) for document in made]

    def _sizes(self, documents: Sequence[Placed]) -> list[list[int]]:
        sizes = [pack.sizes(one.document) for one in documents]
        return [[size[key] for key in self._budgets] for size in sizes]


def rejected(source: Source, record: int, reject: Reject) -> Rejected:
    """A record of a source that was left out, as it is counted."""
    shard, number = source.locate(record)
    return Rejected(
        source.name, source.shards[shard], number, source.id_of(record), reject.reason, str(reject)
    )


def lay_out(
    rows: Sequence[Sequence[Placed]], batch_size: int, row_tokens: int, row_patches: int, patch_dim: int
) -> tuple[dict[str, np.ndarray], list[Rejected], dict[str, int]]:
    """Decodes the pixels of rows and stacks them as one batch, padded with empty rows.

    Returns (batch, documents left out because an image could not be decoded, documents in it by source).
    """
    dropped: list[pack.Dropped] = []
    documents = [[one.document for one in row] for row in rows]
    batch = pack.stack(documents, batch_size, row_tokens, row_patches, patch_dim, dropped)
    reasons = {id(one.document): one.reject for one in dropped}
    served: Counter[str] = Counter()
    rejects = []
    for one in (one for row in rows for one in row):
        if reject := reasons.get(id(one.document)):
            rejects.append(rejected(one.source, one.record, reject))
        else:
            served[one.source.name] += 1
    return batch, rejects, dict(served)


class Lane:
    """Walks through the rows of one lane."""

    def __init__(self, planner: Planner, lane: int, state: LaneState):
        self._planner, self._lane = planner, lane
        self._state, self._window = state, None  # type: LaneState, Window | None

    def take(self, count: int) -> tuple[list[list[Placed]], list[Rejected]]:
        """Returns the next `count` rows, and what was rejected to get them.

        A window's rejects come with its first row.
        """
        rows: list[list[Placed]] = []
        rejects: list[Rejected] = []
        while len(rows) < count:
            if self._window is None:
                self._window = self._planner.plan(self._lane, self._state)
                if self._state.row == 0:
                    rejects += self._window.rejects
            part = self._window.rows[self._state.row :][: count - len(rows)]
            rows += part
            self._state = dataclasses.replace(self._state, row=self._state.row + len(part))
            if self._state.row == len(self._window.rows):
                self._state, self._window = self._window.following, None
        return rows, rejects

    @property
    def state(self) -> LaneState:
        """After the rows taken so far."""
        return self._state
