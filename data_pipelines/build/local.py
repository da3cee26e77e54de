"""The local engine: a pool of processes, one task per shard, and a marker for each shard that is done.

    ingest   per input shard: records through the stages -> .build/ingest/N.array_record (those kept), N.index
    dedup    in this process: all indexes -> the catalog, an SQLite file; losers -> .build/dedup/N.json
    write    per output shard: its records, from the ingest files -> the shard

A build that was killed skips what has its marker. A process holds the index of an input shard or the records
of an output shard in memory, however many there are (`Recipe.num_shards` keeps these small); only what was
rejected is held as a whole (state.py).
"""

import concurrent.futures
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
from array_record.python import array_record_module

from data_pipelines.build import flow, recipes, shards, state
from data_pipelines.build.catalog import Catalog, Entry, Keys, Position
from data_pipelines.build.inputs import InputShard
from data_pipelines.build.items import Kept, Rejected, Target
from data_pipelines.build.progress import Progress
from data_pipelines.build.recipe import Recipe
from data_pipelines.build.store import WORK, Store
from data_pipelines.build.write import write_target
from data_pipelines.records import from_bytes, to_bytes

_READ_AT_ONCE = 16  # records, which are in memory twice until they are taken apart


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
    _each("reading", functools.partial(ingest, recipe, store.url), list(enumerate(input_shards)), pool)
    catalog = _catalog(store)
    catalog.new()
    for number in range(len(input_shards)):
        index = msgpack.unpackb(_index_path(store, number).read_bytes(), use_list=False)
        entries, keys = map(Entry._make, index["kept"]), map(Keys._make, index["keys"])
        catalog.add(recipe, number, entries, keys)
    catalog.drop_duplicates(recipe)
    for number in range(len(input_shards)):
        state.write_dedup(store, number, catalog.lost(recipe, number))

    sample = sorted(catalog.first(recipe.tokenizer_documents))
    tokenizer = flow.make_tokenizer(recipe, (kept.example for kept in _read_kept(store, sample)))
    store.write_text(flow.TOKENIZER, tokenizer)
    write = functools.partial(_write, recipe, store.url, tokenizer, catalog.sources())
    _each("writing", write, catalog.targets(), pool)


def ingest(recipe: Recipe, url: str, numbered_shard: tuple[int, InputShard]) -> None:
    """Reads an input shard and keeps what passes the stages; does nothing if that is done."""
    number, shard = numbered_shard
    store = Store(url)
    if store.exists(state.read_name(number)):
        return
    kept: list[Entry] = []
    keys: list[Keys] = []
    rejects: list[Rejected] = []

    def records() -> Iterator[bytes]:
        for one in flow.read(recipe, number, shard):
            if isinstance(one, Rejected):
                rejects.append(one)
                continue
            example = one.example
            order = flow.order_of(recipe, example.source, example.id)
            kept.append(Entry(one.place[1], example.id, example.source, order))
            keys.extend(Keys(*found, one.place[1]) for found in flow.candidates(recipe, one))
            yield to_bytes(example)

    store.write(_ingest_name(number), lambda path: shards.write_records(path, records()))
    _index_path(store, number).write_bytes(msgpack.packb({"kept": kept, "keys": keys}))
    state.write_read(store, number, len(kept) + len(rejects), rejects)


def _write(recipe: Recipe, url: str, tokenizer: str, sources: list[str], target: Target) -> None:
    store = Store(url)
    records = _read_kept(store, _catalog(store).of(target))
    write_target(recipe, store, target, records, tokenizer, sources)


def _read_kept(store: Store, positions: Sequence[Position]) -> Iterator[Kept]:
    """Yields the records at sorted positions, input shard by input shard."""
    for number, group in itertools.groupby(positions, key=lambda position: position.shard):
        places = list(group)
        reader = array_record_module.ArrayRecordReader(store.path(_ingest_name(number)))
        for start in range(0, len(places), _READ_AT_ONCE):
            some = places[start : start + _READ_AT_ONCE]
            found = reader.read([place.position for place in some])
            for place, record in zip(some, found, strict=True):
                yield Kept((number, place.record), from_bytes(record))
        reader.close()


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """A pool of processes; None for one worker, which is this process."""
    if workers == 1:
        yield None
        return
    # Spawned, because forking a threaded parent can deadlock.
    context = multiprocessing.get_context("spawn")
    files = [str(module.__file__) for module in recipes.modules()]
    with ProcessPoolExecutor(workers, context, initializer=recipes.load, initargs=(files,)) as pool:
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


def _catalog(store: Store) -> Catalog:
    return Catalog(Path(store.path(f"{WORK}/catalog.sqlite")))


def _index_path(store: Store, number: int) -> Path:
    return Path(store.path(f"{WORK}/ingest/{number:05}.index"))
