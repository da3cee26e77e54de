"""The training stream: exact and elastic positions, every record accounted for, whatever is broken."""

import itertools
import json
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data_pipelines import pack, schema
from data_pipelines.errors import DataError, Reject
from data_pipelines.mix import Mixture, deal
from data_pipelines.schema import Document
from data_pipelines.shuffle import Order
from data_pipelines.sources import Options
from data_pipelines.sources.base import Source
from data_pipelines.stream import Feed, Lane, LaneState, Placed, Planner, lay_out

BUDGETS = pack.row_budgets(24, 8)
LAST_READ: deque[int] = deque(maxlen=50)  # of all sources together


class Numbers(Source):
    """Records are their own numbers; counts how many are read."""

    def __init__(self, name: str, length: int, shards: int = 3):
        self._counts = [length // shards + (i < length % shards) for i in range(shards)]
        self.reads = 0
        super().__init__(Options(name, "numbers", name))

    def _open(self):
        return [f"shard {i}" for i in range(len(self._counts))], self._counts

    def _read(self, shard, record):
        self.reads += 1
        LAST_READ.append(int(self.bounds[shard]) + record)
        return LAST_READ[-1]


def document_of(source: str):
    """Records divisible by 7 are rejected, those by 5 have an image that cannot be decoded."""

    def make(raw: int, id_: str, rng: np.random.Generator) -> list[Document]:
        if raw % 7 == 0:
            raise Reject("empty_text", "divisible by 7")
        n, p = 2 + int(rng.integers(10)), int(rng.integers(5))
        tokens = np.full(n + p, raw + 1, np.int32)

        def pixels(out=None) -> np.ndarray:
            if raw % 5 == 0:
                raise Reject("truncated", "divisible by 5")
            return np.zeros((p, 3), np.uint8)

        kinds = np.array([schema.PATCH] * p + [schema.TEXT] * n, np.int32)
        if raw % 5 == 0 and not p:
            raise Reject("truncated", "divisible by 5")
        return [
            Document(
                name=f"{source} {raw}",
                tokens=tokens,
                kinds=kinds,
                image_ids=(kinds == schema.PATCH).astype(np.int32),
                coords=np.zeros((n + p, 3), np.float32),
                targets=tokens,
                loss_weights=np.ones(n + p, np.float32),
                patch_hw=np.zeros((p, 2), np.int32),
                load_patches=pixels,
            )
        ]

    return make


def planner_of(sizes: dict[str, int], lanes: int, window: int, lane_rows: int, mixture=None) -> Planner:
    feeds = [Feed(Numbers(name, n), Order(n, 11), document_of(name)) for name, n in sizes.items()]
    mixture = Mixture(mixture or {name: n for name, n in sizes.items()})
    return Planner(
        feeds, mixture, BUDGETS, seed=3, lanes=lanes, window=window, lane_rows=lane_rows, shuffle=True
    )


def name_of(placed: Placed) -> str:
    return f"{placed.source.name} {placed.source.id_of(placed.record)}"


class Hosts:
    """Any number of hosts that read one stream together, taken up at a position."""

    def __init__(self, planner: Planner, batch_size: int, lanes: int, hosts: int, states: dict):
        self.size, self.m = batch_size, batch_size // lanes
        self.readers = []
        for host in range(hosts):
            rows = range(host * batch_size // hosts, (host + 1) * batch_size // hosts)
            needed = range(rows.start // self.m, (rows.stop - 1) // self.m + 1)
            self.readers.append((rows, {lane: Lane(planner, lane, states[lane]) for lane in needed}))

    def step(self):
        """The rows of a batch as lists of names, and its rejects."""
        rows, rejects = [], []
        for own, lanes in self.readers:
            for number, lane in lanes.items():
                taken, found = lane.take(self.m)
                first = number * self.m
                rejects += found if first in own else []
                mine = [row for i, row in enumerate(taken, first) if i in own]
                _, dropped, _ = lay_out(mine, len(mine), 24, 8, 3)
                rejects += dropped
                lost = {f"{reject.source} {reject.id}" for reject in dropped}
                rows += [[name for name in map(name_of, row) if name not in lost] for row in mine]
        return rows, rejects

    @property
    def states(self):
        found = {}
        for _, lanes in self.readers:
            for number, lane in lanes.items():
                state = lane.state.to_json()
                assert found.setdefault(number, state) == state, "hosts that share a lane agree"
        return {lane: LaneState.from_json(json.loads(json.dumps(state))) for lane, state in found.items()}


hosts_and_steps = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 6)), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=20)
@given(hosts_and_steps, st.sampled_from([1, 2, 4, 8]), st.integers(5, 40))
def test_any_number_of_hosts_continue_the_same_rows(plan, lanes, window):
    sizes, batch_size = {"a": 60, "b": 17}, 8
    mixture = {"a": ((0, 1), (10, 0.1)), "b": ((0, 0.0), (5, 2), (12, 1))}
    planner = planner_of(sizes, lanes, window, batch_size // lanes, mixture)
    start = dict.fromkeys(range(lanes), planner.start())
    straight = Hosts(planner, batch_size, lanes, 1, start)
    states = start
    for hosts, steps in plan:
        part = Hosts(planner, batch_size, lanes, hosts, states)
        for _ in range(steps):
            rows, rejects = straight.step()
            found, found_rejects = part.step()
            assert found == rows
            assert sorted(found_rejects) == sorted(rejects)
        states = part.states


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 40), min_size=1),
    st.sampled_from([1, 2, 4]),
    st.integers(3, 50),
    st.integers(1, 12),
)
def test_served_rejected_and_remaining_are_what_is_stored(sizes, lanes, window, steps):
    sizes = {name: size + 8 for name, size in sizes.items()}
    planner = planner_of(sizes, lanes, window, 4 // lanes)
    hosts = Hosts(planner, 4, lanes, 1, dict.fromkeys(range(lanes), planner.start()))
    seen: Counter[str] = Counter()

    def take(n):
        for _ in range(n):
            rows, rejects = hosts.step()
            seen.update(itertools.chain(*rows))
            seen.update(f"{reject.source} {reject.id}" for reject in rejects)

    try:
        take(steps)
        # What remains of the windows that have begun: go on until every lane is at the end of one.
        lane_windows = [planner.plan(lane, state) for lane, state in hosts.states.items()]
    except DataError as error:  # a small window may hold nothing but records to reject, which ends a run
        assert f"none of {window} records in a row can be used" in str(error)
        assert all(number % 7 == 0 for number in list(LAST_READ)[-window:])
        return
    for (lane, state), window_ in zip(hosts.states.items(), lane_windows, strict=True):
        if state.row:
            seen.update(name_of(one) for row in window_.rows[state.row :] for one in row)
        drawn = window_.following.drawn if state.row else state.drawn
        for name, count, (_, n) in zip(sizes, drawn, sizes.items(), strict=True):
            for j in range(count):
                record = Order(n, 11)(j * lanes + lane)
                seen[f"{name} {Numbers(name, n).id_of(record)}"] -= 1
    assert not +seen and not -seen, "each record drawn is served, rejected or remaining, once"


def test_an_epoch_serves_every_record_once():
    n, lanes = 120, 4
    planner = planner_of({"a": n}, lanes, 30, 1)
    first = [planner.plan(lane, planner.start()) for lane in range(lanes)]
    ids = Counter(name_of(one) for window in first for row in window.rows for one in row)
    ids.update(f"a {reject.id}" for window in first for reject in window.rejects)
    source, order = planner._feeds[0].source, Order(n, 11)
    places = [j * lanes + lane for lane, window in enumerate(first) for j in range(window.following.drawn[0])]
    assert ids == Counter(f"a {source.id_of(order(place))}" for place in places)
    assert set(range(n)) <= set(places), "the windows hold one epoch, and what filled up their last rows"
    assert sorted(order(place) for place in range(n)) == list(range(n))


def test_going_on_reads_one_window():
    planner = planner_of({"a": 100_000}, 1, 50, 4)
    hosts = Hosts(planner, 4, 1, 1, {0: planner.start()})
    for _ in range(100):
        expected = hosts.step()
        states = hosts.states
    following = hosts.step()
    source = planner._feeds[0].source
    source.reads = 0
    again = Hosts(planner, 4, 1, 1, states)
    assert source.reads == 0
    assert again.step() == following != expected
    assert source.reads <= 100, "the window it was in, and the next one if that ended"


def test_a_window_without_a_single_document_is_an_error():
    planner = planner_of({"a": 1}, 1, 4, 1)  # record 0 is divisible by 7
    with pytest.raises(
        DataError, match="none of 4 records in a row can be used; the last was shard 0, record 0"
    ):
        planner.plan(0, planner.start())


# Mixtures


@given(st.lists(st.floats(0, 5), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1), st.integers(1, 400))
def test_deal_keeps_every_share_to_within_a_document(weights, count):
    shares = Mixture({str(i): w for i, w in enumerate(weights)}).at(0)
    sources, credit = deal(shares, np.zeros(len(weights)), count)
    given_ = np.bincount(sources, minlength=len(weights))
    np.testing.assert_allclose(given_ + credit, shares * count, atol=1e-6)
    assert (np.abs(credit) < len(weights)).all()
    more, _ = deal(shares, credit, 10)
    assert [*sources, *more] == deal(shares, np.zeros(len(weights)), count + 10)[0].tolist()


def test_ramps():
    mixture = Mixture({"a": ((10, 1), (20, 3)), "b": 1})
    for step, share in ((0, 1 / 2), (10, 1 / 2), (15, 2 / 3), (20, 3 / 4), (99, 3 / 4)):
        assert mixture.at(step)[0] == pytest.approx(share)


# Packing


@given(
    st.integers(1, 4).flatmap(
        lambda k: st.tuples(
            st.lists(st.lists(st.integers(0, 30), min_size=k, max_size=k), max_size=60),
            st.lists(st.integers(30, 60), min_size=k, max_size=k),
        )
    )
)
def test_assign_keeps_every_budget_and_loses_nothing(case):
    sizes, budgets = case
    rows = pack.assign(sizes, budgets)
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    for row in rows:
        assert (np.sum([sizes[i] for i in row], axis=0) <= budgets).all()
    # No two rows could be one: best fit never opens a row while a document fits into another.
    totals = np.array([np.sum([sizes[i] for i in row], axis=0) for row in rows])
    for a, b in itertools.combinations(range(len(rows)), 2):
        assert (totals[a] + totals[b] > budgets).any()


def test_packing_fills_rows_of_8192():
    """Photos of 256-1024 px at 32 px per token, with captions; the patch budget is the data's share + 5 %."""
    rng = np.random.default_rng(0)
    sides = rng.integers(8, 33, (4096, 2))
    patches = sides.prod(axis=1)
    tokens = patches + 2 + rng.lognormal(4, 0.8, len(patches)).astype(int).clip(4, 2000)
    budget = round(8192 * 1.05 * patches.sum() / tokens.sum())
    sizes = np.stack([tokens, patches], axis=1)
    for window in (256, 1024):
        used = total = 0
        start = 0
        while start + window < len(sizes):
            packer = pack.Packer([8192, budget])
            packer.fill(sizes[start : start + window])
            end = start + window
            while end < len(sizes) and packer.top_up(sizes[end : end + 1]):
                end += 1
            used, total = used + tokens[start:end].sum(), total + 8192 * len(packer.rows)
            start = end
        assert used / total >= 0.985
