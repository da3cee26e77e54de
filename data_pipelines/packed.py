"""Training on rows that a build packed: the position is the number of batches, and any of them is read alone.

Batch s holds rows s * batch_size ... of an endless shuffled sequence (shuffle.Order), whatever the number of
processes, threads and worker processes; to go on from step N, nothing before it is read.
"""

import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from data_pipelines import rows as rows_lib, schema
from data_pipelines.build.outputs import Rows
from data_pipelines.errors import DataError
from data_pipelines.rejects import Rejected
from data_pipelines.rows import RowShape
from data_pipelines.shuffle import Order
from data_pipelines.sources import Source

Batch = dict[str, np.ndarray]


def shape_of(manifest: dict[str, Any], config: Any, stage: Any) -> RowShape:
    """The shape of a folder's rows. Raises DataError if the config asks for rows packed by other rules."""
    built = manifest["parameters"]["recipe"]["output"]
    wanted = Rows.from_config(config, stage).to_json()
    if different := sorted(name for name in wanted if wanted[name] != built.get(name)):
        told = "; ".join(f"{name}: built {built.get(name)}, wanted {wanted[name]}" for name in different)
        raise DataError(f"the packed rows of {config.data.path} follow other rules than the config ({told})")
    return RowShape.from_json(manifest["rows"])


class _Batches(grain.sources.RandomAccessDataSource):
    """Batch number -> this process's rows of it."""

    def __init__(
        self, source: Source, order: Order, shape: RowShape, own: range, batch_size: int, first: int
    ):
        self._source, self._order, self._shape = source, order, shape
        self._own, self._batch_size, self._first = own, batch_size, first

    def __len__(self) -> int:
        return sys.maxsize // 2 - self._first

    def __getitem__(self, index: int) -> Batch:
        place = (self._first + index) * self._batch_size
        records = [self._order(place + row) for row in self._own]
        return stack([self._source[record] for record in records], self._shape, len(records))


def stack(records: list[bytes], shape: RowShape, batch_size: int) -> Batch:
    """Row records as a batch (fields: `schema.batch_shapes`), padded with empty rows."""
    shapes = schema.batch_shapes(batch_size, shape.row_tokens, shape.row_patches, shape.patch_dim)
    batch = {name: np.zeros(dims, dtype) for name, (dims, dtype) in shapes.items()}
    batch["patch_index"] -= 1
    for b, record in enumerate(records):
        rows_lib.fill(record, shape, {name: array[b] for name, array in batch.items()})
    return batch


class PackedLoader:
    """As `loader.Loader`, over packed rows."""

    def __init__(
        self,
        source: Source,
        shape: RowShape,
        source_names: list[str],
        identity: str,
        *,
        seed: int | None,
        own: range,
        batch_size: int,
        prefetch: int,
        workers: int,
    ):
        self.source_names = source_names
        self._identity = identity
        self._arguments = (source, Order(len(source), seed, None), shape, own, batch_size)
        self._prefetch, self._workers = prefetch, workers
        self._iterator: Any = None
        self._start(0)

    def _start(self, step: int) -> None:
        self._stop()
        self._step = step
        batches = grain.MapDataset.source(_Batches(*self._arguments, step))
        options = grain.ReadOptions(num_threads=min(self._prefetch, 16), prefetch_buffer_size=self._prefetch)
        dataset = batches.to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # read by Grain's worker processes, not used by us
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        self._iterator = iter(dataset)

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; this process's rows only. Raises DataError if a shard cannot be read."""
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator)
        self._step += 1
        return batch

    def take_rejects(self) -> list[Rejected]:
        """Always none: the build has rejected what cannot be used."""
        return []

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch handed out: one number, of the whole run."""
        return {"identity": self._identity, "lanes": {"0": [self._step]}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position; reads nothing yet. Raises DataError if it was taken on other data or seed."""
        if state.get("identity") != self._identity:
            raise DataError("the saved data position is of other data, another seed or other stage settings")
        self._start(int(state["lanes"]["0"][0]))

    def close(self) -> None:
        """Stops threads and processes. There are no batches after this."""
        self._stop()

    def __enter__(self) -> "PackedLoader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def eval_batches(sources: dict[str, Source], shape: RowShape, batch_size: int, own: range) -> Iterator[Batch]:
    """Yields every row once in stored order; this process's rows of each batch, the last with empty ones."""
    for source in sources.values():
        for start in range(0, len(source), batch_size):
            part = [source[start + row] for row in own if start + row < len(source)]
            yield stack(part, shape, len(own))
