"""From sources to batches.

    records -> shuffle, mix -> documents -> windows packed into rows -> pixels -> batch -> prefetch

    promise          online: any source, packed while training        packed: rows that a build wrote
    exact resume     yes                                              yes
    other hosts      yes: the position does not mention them          yes
    going on         reads one window of records per lane             reads nothing
    place of step N  known from a checkpoint                          computed, step * batch_size
    decoding         on every host for its rows only                  the same

Reading, tokenising and packing is done for the lanes (stream.py) whose rows a process needs, pixels are
decoded for its own rows only. Grain carries batches over from worker processes, or from a thread; the
position is ours.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from data_pipelines import build, mix, pack, packed
from data_pipelines.dataset import Data, open_data
from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError, Reject
from data_pipelines.makers import make_makers, row_budgets
from data_pipelines.mix import TRAIN, Mixture
from data_pipelines.rejects import Budget, Quarantine, Rejected
from data_pipelines.shuffle import Order
from data_pipelines.sources import Source
from data_pipelines.sources.drawings import DrawingSource
from data_pipelines.stream import Feed, Lane, LaneState, Placed, Planner, lay_out, rejected

Batch = dict[str, np.ndarray]

# Fields of config.data that do not change what is where in the stream.
_HOW = (
    "path",
    "recipe",
    "tokenizer",
    "sources",
    "prefetch",
    "workers",
    "index_path",
    "quarantine",
    "max_rejected",
    "image_size",
)
# Fields of a stage that do.
_WHAT = (
    "batch_size",
    "row_tokens",
    "row_patches",
    "min_pixels",
    "max_pixels",
    "tags_share",
    "parallel_share",
    "template",
    "layout",
)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Size of a batch of rows."""

    row_tokens: int
    row_patches: int
    patch_dim: int


class _Rows(grain.IterDataset):
    """Rows first..last-1 of every batch, as {"batch": arrays, "note": JSON}; runs in a worker process."""

    def __init__(
        self, planner: Planner, shape: _Shape, rows: range, lane_rows: int, states: Mapping[int, LaneState]
    ):
        super().__init__()
        self.planner, self.shape, self.rows, self.lane_rows = planner, shape, rows, lane_rows
        self.states = states

    @property
    def lanes(self) -> range:
        """The lanes that these rows belong to."""
        return range(self.rows.start // self.lane_rows, (self.rows.stop - 1) // self.lane_rows + 1)

    def __iter__(self) -> grain.DatasetIterator:
        return _RowsIterator(self)


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, rows: _Rows):
        super().__init__()
        self._of = rows
        self._lanes = {lane: Lane(rows.planner, lane, rows.states[lane]) for lane in rows.lanes}

    def __next__(self) -> dict[str, Any]:
        of, shape = self._of, self._of.shape
        rows: list[list[Placed]] = []
        rejects: list[Rejected] = []
        for number, lane in self._lanes.items():
            taken, found = lane.take(of.lane_rows)
            first = number * of.lane_rows
            if first in of.rows:  # else the reader of the lane's first row tells
                rejects += found
            rows += [row for i, row in enumerate(taken, start=first) if i in of.rows]
        batch, dropped, served = lay_out(
            rows, len(of.rows), shape.row_tokens, shape.row_patches, shape.patch_dim
        )
        note = {
            "lanes": {number: lane.state.to_json() for number, lane in self._lanes.items()},
            "rejects": [*rejects, *dropped],
            "served": served,
        }
        return {"batch": batch, "note": json.dumps(note)}

    def get_state(self) -> dict[str, Any]:
        return {}  # the position is in the elements

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("make a new dataset with other states")


class Loader:
    """An endless iterator of training batches with an exact, JSON-able position.

    Attributes:
        source_names: the data's sources, in the order of `source_ids`.
    """

    def __init__(
        self,
        readers: Sequence[_Rows],
        source_names: list[str],
        identity: str,
        *,
        prefetch: int,
        in_processes: bool,
        budget: Budget,
        quarantine: Quarantine | None,
    ):
        self.source_names = source_names
        self._readers, self._identity = readers, identity
        self._prefetch, self._in_processes = prefetch, in_processes
        self._budget, self._quarantine = budget, quarantine
        self._rejects: list[Rejected] = []
        self._iterators: list[Any] = []
        self._start({lane: reader.states[lane] for reader in readers for lane in reader.lanes})

    def _start(self, states: Mapping[int, LaneState]) -> None:
        self._stop()
        if self._in_processes and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl's flags, which we do not use
        # Not the lanes of others: in the next position these would stand where they had been at the restart.
        self._lanes = {lane: states[lane].to_json() for reader in self._readers for lane in reader.lanes}
        for reader in self._readers:
            rows = _Rows(reader.planner, reader.shape, reader.rows, reader.lane_rows, states)
            if self._in_processes:
                options = grain.MultiprocessingOptions(
                    num_workers=1, per_worker_buffer_size=max(1, self._prefetch)
                )
                self._iterators.append(iter(rows.mp_prefetch(options)))
            elif self._prefetch:
                self._iterators.append(
                    iter(
                        grain.experimental.ThreadPrefetchIterDataset(
                            rows, prefetch_buffer_size=self._prefetch
                        )
                    )
                )
            else:
                self._iterators.append(iter(rows))

    def _stop(self) -> None:
        for iterator in self._iterators:
            iterator.close()
        self._iterators = []  # Grain's own iterators complain if they live until Python exits

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch (fields: `schema.batch_shapes`); this process's rows only.

        Raises DataError if data cannot be read, or a source exceeds its budget of rejects.
        """
        if not self._iterators:
            raise StopIteration
        parts = [next(iterator) for iterator in self._iterators]
        for part in parts:
            note = json.loads(part["note"])
            self._lanes |= {int(lane): state for lane, state in note["lanes"].items()}
            rejects = [Rejected(*fields) for fields in note["rejects"]]
            self._rejects += rejects
            if self._quarantine is not None:
                self._quarantine.write(rejects)
            self._budget.charge(note["served"], rejects)
        batches = [part["batch"] for part in parts]
        if len(batches) == 1:
            return batches[0]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def take_rejects(self) -> list[Rejected]:
        """Returns what was rejected since the last call, as of the last batch handed out."""
        rejects, self._rejects = self._rejects, []
        return rejects

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch handed out, whatever has been prefetched.

        A process among several knows the lanes it reads; `merge_states` puts their positions together.
        """
        lanes = {str(lane): state for lane, state in sorted(self._lanes.items())}
        return {"identity": self._identity, "lanes": lanes}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position that any number of processes left off at; reads nothing yet.

        Raises DataError if it was taken on other data, seed, stage or mixture.
        """
        if state.get("identity") != self._identity:
            raise DataError("the saved data position is of other data, another seed or other stage settings")
        states = {int(lane): LaneState.from_json(value) for lane, value in state["lanes"].items()}
        if missing := {lane for reader in self._readers for lane in reader.lanes} - states.keys():
            raise DataError(
                f"the saved data position lacks lanes {sorted(missing)}: a process did not save its own"
            )
        self._start(states)

    def close(self) -> None:
        """Stops threads and processes. There are no batches after this."""
        self._stop()
        if self._quarantine is not None:
            self._quarantine.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


AnyLoader = Loader | packed.PackedLoader


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of a run out of those of its processes.

    Raises DataError if their streams differ, or if two that read the same lane are not at the same place.
    """
    if len({state["identity"] for state in states}) != 1:
        raise DataError("the processes of this run read different data, or with different settings")
    lanes: dict[str, Any] = {}
    for state in states:
        for lane, value in state["lanes"].items():
            if lanes.setdefault(lane, value) != value:
                raise DataError(f"the processes of this run are not at the same place of lane {lane}")
    return states[0] | {"lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def train_loader(
    config: Any, stage: Any, *, seed: int, process_index: int = 0, process_count: int = 1
) -> AnyLoader:
    """Returns the training stream of a stage.

    Order and augmentation are a pure function of `seed` and the position. The rows of all processes together
    do not depend on `process_count`, nor on the number of worker processes.

    Args:
        config: the whole config.
        stage: the stage's part of it.
        seed: any non-negative integer.
        process_index, process_count: this process gets its share of each batch's rows.

    Raises:
        DataError: if the data cannot be used, the mixture is impossible, or a document exceeds a budget.
    """
    data = open_data(config.data)
    _check_vocabulary(config, data)
    sources = data.split(TRAIN)
    if data.packed is not None:
        return _packed_loader(config, stage, data, data.packed, seed, process_index, process_count)
    weights = mix.by_size(dict(stage.mixture), {name: len(source) for name, source in sources.items()})
    makers = make_makers(config, stage, data, {name: sources[name] for name in weights})
    shuffle_seed, stream_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    order_seed = shuffle_seed if config.data.shuffle else None
    feeds = [
        Feed(
            sources[name],
            Order(len(sources[name]), order_seed, sources[name].blocks),
            makers[name].for_training,
        )
        for name in weights
    ]
    lanes = config.data.lanes
    if stage.batch_size % lanes:
        raise DataError(f"batch_size={stage.batch_size} is not a multiple of data.lanes={lanes}")
    lane_rows = stage.batch_size // lanes
    planner = Planner(
        feeds,
        Mixture(weights),
        row_budgets(config, stage),
        seed=stream_seed,
        lanes=lanes,
        window=config.data.window,
        lane_rows=lane_rows,
        shuffle=config.data.shuffle,
    )
    side = config.model.embed.patch_size * config.model.embed.merge_size
    shape = _Shape(stage.row_tokens, stage.row_patches, side**2 * 3)
    readers = max(1, config.data.workers)
    rows = own_rows(stage.batch_size, process_index, process_count)
    states = dict.fromkeys(range(lanes), planner.start())
    quarantine = config.data.quarantine
    return Loader(
        [
            _Rows(
                planner,
                shape,
                rows[i * len(rows) // readers : (i + 1) * len(rows) // readers],
                lane_rows,
                states,
            )
            for i in range(readers)
        ],
        data.source_names,
        _stream_identity(config, stage, seed, data),
        prefetch=config.data.prefetch,
        in_processes=config.data.workers > 0,
        budget=Budget(data.max_rejected),
        quarantine=Quarantine(_of_process(quarantine, process_index)) if quarantine else None,
    )


def _packed_loader(
    config: Any,
    stage: Any,
    data: Data,
    manifest: dict[str, Any],
    seed: int,
    process_index: int,
    process_count: int,
) -> packed.PackedLoader:
    sources = data.split(TRAIN)
    if set(stage.mixture) - {mix.ALL, *sources}:
        raise DataError(
            f"stage.mixture {dict(stage.mixture)}: packed rows are of all sources, mixed when they "
            f'were built; write {{"{mix.ALL}": 1.0}}'
        )
    [source] = sources.values()
    shuffle_seed, _ = np.random.SeedSequence(seed).generate_state(2).tolist()
    return packed.PackedLoader(
        source,
        packed.shape_of(manifest, config, stage),
        data.source_names,
        _stream_identity(config, stage, seed, data),
        seed=shuffle_seed if config.data.shuffle else None,
        own=own_rows(stage.batch_size, process_index, process_count),
        batch_size=stage.batch_size,
        prefetch=config.data.prefetch,
        workers=config.data.workers,
    )


def _of_process(path: str, process_index: int) -> str:
    """Processes do not write to one file."""
    return f"{path}.{process_index}" if process_index else path


def _check_vocabulary(config: Any, data: Data) -> None:
    if data.tokenizer.size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer has {data.tokenizer.size} tokens, more than "
            f"model.vocab_size={config.model.vocab_size}"
        )


def _stream_identity(config: Any, stage: Any, seed: int, data: Data) -> str:
    """Returns a hash of all that decides which documents are where in the stream."""
    embed = config.model.embed
    decides = {
        "data_hash": data.data_hash,
        "seed": seed,
        "mixture": list(stage.mixture.items()),
        "side": embed.patch_size * embed.merge_size,
        "visual_share": config.model.route.visual_share,
        "templates": data.templates,
        "data": {name: value for name, value in config.data.items() if name not in _HOW},
        "stage": {name: stage[name] for name in _WHAT},
    }
    return build.json_hash(decides)


def eval_batches(
    config: Any, stage: Any, split: str, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields every document of a split once, in batches of stage.batch_size rows; the last has empty rows.

    Stored order, white background, no augmentation; a window of documents is packed at a time. Raises
    DataError like `train_loader`, and for a source that exceeds its budget of rejects.
    """
    data = open_data(config.data)
    _check_vocabulary(config, data)
    sources, budgets = data.split(split), row_budgets(config, stage)
    if data.packed is not None:
        own = own_rows(stage.batch_size, process_index, process_count)
        shape = packed.shape_of(data.packed, config, stage)
        yield from packed.eval_batches(sources, shape, stage.batch_size, own)
        return
    makers = make_makers(config, stage, data, sources)
    side = config.model.embed.patch_size * config.model.embed.merge_size
    own = own_rows(stage.batch_size, process_index, process_count)
    charge = Budget(data.max_rejected).charge
    rows: list[list[Placed]] = []

    def batch_of(part: Sequence[list[Placed]]) -> Batch:
        part = part[own.start : own.stop]
        batch, rejects, served = lay_out(part, len(own), stage.row_tokens, stage.row_patches, side**2 * 3)
        charge(served, rejects)
        return batch

    def documents() -> Iterator[Placed]:
        for index, (source, record) in enumerate(_stored(sources)):
            try:
                made = makers[source.name].for_evaluation(source[record], source.id_of(record), index)
            except Reject as reject:
                charge({}, [rejected(source, record, reject)])
            else:
                yield from (Placed(document, source, record) for document in made)

    stream = documents()
    while window := list(itertools.islice(stream, config.data.window)):
        found = pack.pack_rows([one.document for one in window], budgets)
        placed = {id(one.document): one for one in window}
        rows += [[placed[id(document)] for document in row] for row in found]
        while len(rows) >= stage.batch_size:
            yield batch_of(rows[: stage.batch_size])
            rows = rows[stage.batch_size :]
    if rows:
        yield batch_of(rows)


def _stored(sources: Mapping[str, Source]) -> Iterator[tuple[Source, int]]:
    """Every record of the sources, in stored order."""
    for source in sources.values():
        for record in range(len(source)):
            yield source, record


def read_drawings(config: Any, split: str) -> list[Drawing]:
    """Returns every drawing of a split, sorted by id.

    Raises DataError if the data cannot be used, or is not the quickstart's.
    """
    drawings: list[Drawing] = []
    for source in open_data(config.data).split(split).values():
        if not isinstance(source, DrawingSource):
            raise DataError(
                f"source {source.name}: its records are not the quickstart's drawings, which retrieval "
                "and captions are measured on"
            )
        drawings += [Drawing.from_bytes(source[record]) for record in range(len(source))]
    return sorted(drawings, key=lambda drawing: drawing.id)


def own_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of a batch that a process lays out. Raises DataError if they cannot be shared out evenly."""
    if batch_size % process_count:
        raise DataError(f"batch_size={batch_size} is not a multiple of the {process_count} processes")
    n = batch_size // process_count
    return range(process_index * n, (process_index + 1) * n)
