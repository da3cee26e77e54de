"""A build from input to manifest, on either engine."""

import dataclasses
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipelines.build import flow, inputs, local, manifest, state
from data_pipelines.build.inputs import InputShard
from data_pipelines.build.recipe import Recipe
from data_pipelines.build.store import WORK, Store
from data_pipelines.errors import DataError
from data_pipelines.sources import Options

RUNNERS = ("local", "beam")
SHARD_BYTES = 512_000_000  # of input to an output shard, which is sorted in memory


def run(
    recipe: Recipe,
    sources: Sequence[Options],
    output: str,
    *,
    runner: str = "local",
    workers: int | None = None,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds a data folder and returns its manifest; equal recipe and input give equal bytes on every runner.

    A folder that holds this very build, finished, is left as it is; unfinished, it is finished.

    Args:
        recipe: what to do.
        sources: the input.
        output: folder or fsspec URL; "local" wants a folder.
        runner: "local" or "beam".
        workers: processes of the local runner; None = one per core.
        flags: for Beam.

    Raises:
        DataError: the folder holds something else, the input cannot be read, or the output cannot be written.
    """
    start = time.monotonic()
    store = Store(output)
    if runner == "local" and not store.local:
        raise DataError(
            f"{output}: the local runner writes to a local folder; use --runner=beam, or copy the folder"
        )
    shards = inputs.list_shards(sources)
    if not recipe.num_shards:
        recipe = dataclasses.replace(recipe, num_shards=_num_shards(store, sources))
    plan = {"recipe": recipe.describe(), "input": inputs.identity(sources)}
    recipe_hash = manifest.json_hash(plan)
    if store.exists(manifest.MANIFEST):
        found = store.read_json(manifest.MANIFEST)
        if found.get("recipe_hash") != recipe_hash:
            raise DataError(
                f"{output}: holds other data than this recipe and input give; choose another folder"
            )
        print(f"{output} is built already", file=sys.stderr)
        return found
    with _only_build(store):
        state.begin(store, plan)
        print(f"building {output} with recipe {recipe.name} from {len(shards)} shards", file=sys.stderr)
        if runner == "beam":
            from data_pipelines.build import on_beam

            on_beam.run(recipe, shards, store, flags)
        else:
            local.run(recipe, shards, store, workers or os.cpu_count() or 1)
        made = _manifest(recipe, store, shards, plan, recipe_hash)
        store.write_text(manifest.MANIFEST, manifest.to_text(made))
    store.delete(WORK)
    for split, counts in made["counts"].items():
        records = sum(shard["records"] for shard in made["shards"] if shard["split"] == split)
        print(f"{split}: {sum(counts.values())} documents in {records} records", file=sys.stderr)
    rejected = sum(sum(part.values()) for part in made["rejects"].values())
    print(f"{rejected} rejected; built in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return made


def _num_shards(store: Store, sources: Sequence[Options]) -> int:
    """As many as the build that is in the folder has, so that it goes on; else by the input's size."""
    for name in (manifest.MANIFEST, state.PLAN):
        if store.exists(name):
            found = store.read_json(name)
            begun = found.get("parameters", found).get("recipe")
            if isinstance(begun, dict) and begun.get("num_shards"):
                return begun["num_shards"]
    return max(1, -(-inputs.num_bytes(sources) // SHARD_BYTES))


def _manifest(
    recipe: Recipe, store: Store, shards: Sequence[InputShard], plan: dict[str, Any], recipe_hash: str
) -> dict[str, Any]:
    found = state.collect(recipe, store, [shard.describe() for shard in shards])
    tokenizer = store.read_bytes(flow.TOKENIZER)
    entry = {"file": flow.TOKENIZER, "bytes": len(tokenizer), "sha256": hashlib.sha256(tokenizer).hexdigest()}
    sources = sorted({source for counts in found["counts"].values() for source in counts})
    if not sources:
        raise DataError(f"{store.url}: no record is left; see the folder's rejects/*.jsonl for the reasons")
    return (
        found
        | {
            "format": manifest.FORMAT,
            "form": recipe.output.form,
            "recipe_hash": recipe_hash,
            "parameters": plan,
            "sources": sources,
            "tokenizer": entry,
            "data_hash": manifest.json_hash([found["shards"], entry]),
        }
        | recipe.output.describe()
    )


@contextmanager
def _only_build(store: Store) -> Iterator[None]:
    """Keeps a second process of this machine from building the same local folder. Kills release the lock."""
    if not store.local:
        yield
        return
    path = Path(store.url).parent / f".{Path(store.url).name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise DataError(f"{store.url}: cannot write {error.filename}: {error.strerror}") from error
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{store.url}: another process is building it") from error
        yield
        path.unlink()
