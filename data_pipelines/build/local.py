"""The local engine: a pool of processes, one task per shard, and a marker for each shard that is done.

    ingest   per input shard: records through the stages -> .build/ingest/N.array_record (those kept), N.index
    dedup    in this process: the keys of all indexes in one dict
    write    per output shard: its records, from the ingest files -> the shard

A build that was killed skips what has its marker. All keys are in memory at once, from 200 bytes per record
(ExactImage) to 3 kB (SimilarText): beyond some millions of records use --runner=beam.
"""

import concurrent.futures
import functools
import itertools
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
from array_record.python import array_record_module

from data_pipelines.build import dedup, flow, shards, state
from data_pipelines.build.inputs import InputShard
from data_pipelines.build.items import Kept, Place, Rejected, Target
from data_pipelines.build.progress import Progress
from data_pipelines.build.recipe import Recipe
from data_pipelines.build.store import WORK, Store
from data_pipelines.build.write import write_target
from data_pipelines.records import from_bytes, to_bytes


class _Entry(NamedTuple):
    """A kept record in the index of its input shard; its position there is that in the ingest file."""

    record: int
    id: str
    source: str
    order: bytes


def run(recipe: Recipe, input_shards: Sequence[InputShard], store: Store, workers: int) -> None:
    """Brings the build to the point where every shard has its marker; see the module's head.

    Args:
        recipe: what to do.
        input_shards: see inputs.py.
        store: a local folder.
        workers: processes; 1 runs everything in this one.
    """
    with _pool(workers) as pool:
        _run(recipe, input_shards, store, pool)


def _run(recipe: Recipe, input_shards: Sequence[InputShard], store: Store, pool: Executor | None) -> None:
    numbers = range(len(input_shards))
    _each("reading", functools.partial(ingest, recipe, store.url), list(enumerate(input_shards)), pool)
    entries: dict[Place, tuple[int, _Entry]] = {}  # -> position in the ingest file, entry
    keys: dict[tuple[int, bytes], list[dedup.Candidate]] = defaultdict(list)
    for number in numbers:
        index = msgpack.unpackb(_index_path(store, number).read_bytes(), use_list=False)
        for position, entry in enumerate(map(_Entry._make, index["kept"])):
            entries[number, entry.record] = (position, entry)
        for rule_number, found, evidence, record, id_ in index["keys"]:
            candidate = dedup.Candidate((number, record), id_, evidence)
            for key in found:
                keys[rule_number, key].append(candidate)

    lost = _losers(recipe, keys)
    del keys
    for number in numbers:
        rejects = []
        for place in [place for place in lost if place[0] == number]:
            _, entry = entries.pop(place)
            rule_number, kept_id = lost[place]
            rejects.append(flow.superfluous(recipe, rule_number, kept_id, place, entry.id, entry.source))
        state.write_dedup(store, number, rejects)

    places = sorted(entries, key=lambda place: (entries[place][1].order, place))
    sample = [(place[0], entries[place][0]) for place in places[: recipe.tokenizer_documents]]
    tokenizer = flow.make_tokenizer(recipe, (kept.example for kept in _read_kept(store.url, sample)))
    store.write_text(flow.TOKENIZER, tokenizer)
    sources = sorted({entry.source for _, entry in entries.values()})
    targets: dict[Target, list[tuple[int, int]]] = defaultdict(list)
    for place in places:
        position, entry = entries[place]
        targets[flow.target_of(recipe, entry.source, entry.order)].append((place[0], position))
    write = functools.partial(_write, recipe, store.url, tokenizer, sources)
    _each("writing", write, sorted(targets.items()), pool)


def ingest(recipe: Recipe, url: str, numbered_shard: tuple[int, InputShard]) -> None:
    """Reads an input shard and keeps what passes the stages; does nothing if that is done."""
    number, shard = numbered_shard
    store = Store(url)
    if store.exists(state.read_name(number)):
        return
    kept: list[_Entry] = []
    keys: list[tuple[Any, ...]] = []
    rejects: list[Rejected] = []

    def records() -> Iterator[bytes]:
        for one in flow.read(recipe, number, shard):
            if isinstance(one, Rejected):
                rejects.append(one)
                continue
            example = one.example
            order = flow.order_of(recipe, example.source, example.id)
            kept.append(_Entry(one.place[1], example.id, example.source, order))
            keys.extend((*found, one.place[1], example.id) for found in flow.candidates(recipe, one))
            yield to_bytes(example)

    store.write(_ingest_name(number), lambda path: shards.write_records(path, records()))
    _index_path(store, number).write_bytes(msgpack.packb({"kept": kept, "keys": keys}))
    state.write_read(store, number, len(kept) + len(rejects), rejects)


def _losers(
    recipe: Recipe, keys: dict[tuple[int, bytes], list[dedup.Candidate]]
) -> dict[Place, tuple[int, str]]:
    """Returns place -> (number of the first rule that leaves it out, id of the record that stays)."""
    lost: dict[Place, tuple[int, str]] = {}
    for (rule_number, _), group in keys.items():
        for loser in dedup.losers(recipe.dedup[rule_number], group):
            found = (rule_number, loser.kept)
            lost[loser.place] = min(found, lost.get(loser.place, found))
    return lost


def _write(
    recipe: Recipe,
    url: str,
    tokenizer: str,
    sources: list[str],
    job: tuple[Target, list[tuple[int, int]]],
) -> None:
    target, positions = job
    write_target(recipe, Store(url), target, _read_kept(url, positions), tokenizer, sources)


def _read_kept(url: str, positions: Sequence[tuple[int, int]]) -> Iterator[Kept]:
    """Yields the records at (input shard, position in its ingest file), shard by shard."""
    store = Store(url)
    for number, group in itertools.groupby(sorted(positions), key=lambda position: position[0]):
        index = msgpack.unpackb(_index_path(store, number).read_bytes(), use_list=False)
        reader = array_record_module.ArrayRecordReader(store.path(_ingest_name(number)))
        wanted = [position for _, position in group]
        for position, record in zip(wanted, reader.read(wanted), strict=True):
            yield Kept((number, index["kept"][position][0]), from_bytes(record))
        reader.close()


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """A pool of processes; None for one worker, which is this process."""
    if workers == 1:
        yield None
        return
    # Spawned, because forking a threaded parent can deadlock.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def _each(label: str, task: Callable[[Any], None], jobs: Sequence[Any], pool: Executor | None) -> None:
    """Runs every job and shows progress; the first error stops it all."""
    progress = Progress(label, len(jobs))
    if pool is None:
        for job in jobs:
            task(job)
            progress.advance()
        return
    futures = [pool.submit(task, job) for job in jobs]
    try:
        for future in concurrent.futures.as_completed(futures):
            future.result()
            progress.advance()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _ingest_name(number: int) -> str:
    return f"{WORK}/ingest/{number:05}.array_record"


def _index_path(store: Store, number: int) -> Path:
    return Path(store.path(f"{WORK}/ingest/{number:05}.index"))
