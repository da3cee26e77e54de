"""What an unfinished build leaves in its folder, and how the manifest is put together from it.

    .build/plan.json       what is being built; another build refuses to go on with it
    .build/read/N.json     input shard N has been read: its number of records, and those its stages rejected
    .build/dedup/N.json    its records that dedup rules left out
    .build/done/FILE.json  output shard FILE is whole: its manifest entry, its statistics, its rejects

Both engines write these files and nothing else counts, so they may be mixed: a build begun locally can
be finished on Beam. The folder .build goes when the manifest is there.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines.build import statistics
from data_pipelines.build.items import Rejected, Target
from data_pipelines.build.recipe import Recipe
from data_pipelines.build.store import WORK, Store
from data_pipelines.errors import DataError

PLAN = f"{WORK}/plan.json"


def read_name(number: int) -> str:
    return f"{WORK}/read/{number:05}.json"


def dedup_name(number: int) -> str:
    return f"{WORK}/dedup/{number:05}.json"


def done_name(recipe: Recipe, target: Target) -> str:
    return f"{WORK}/done/{target.file(recipe.num_shards)}.json"


def write_read(store: Store, number: int, num_records: int, rejects: Iterable[Rejected]) -> None:
    store.write_json(read_name(number), {"records": num_records, "rejects": sorted(map(list, rejects))})


def write_dedup(store: Store, number: int, rejects: Iterable[Rejected]) -> None:
    store.write_json(dedup_name(number), {"rejects": sorted(map(list, rejects))})


def begin(store: Store, plan: dict[str, Any]) -> None:
    """Claims the folder for a build, or goes on with it if it is the same one.

    Raises DataError if the folder holds something else.
    """
    if store.exists(PLAN):
        found = store.read_json(PLAN)
        if found != plan:
            changed = [key for key in plan if found.get(key) != plan[key]]
            raise DataError(
                f"{store.url} holds an unfinished build with another {' and '.join(changed)}; "
                "choose another folder or delete it"
            )
    elif names := store.names():
        raise DataError(f"{store.url}: exists and is not empty (it has {names[0]}); choose another folder")
    else:
        store.write_json(PLAN, plan)


def collect(recipe: Recipe, store: Store, input_shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes rejects/N.jsonl for each input shard that has any; returns the manifest's part about records.

    Raises DataError if the numbers do not add up: every record of the input must be written or rejected.
    """
    done = [store.read_json(name) for name in _done_names(recipe, store)]
    rejects: list[list[Rejected]] = [[] for _ in input_shards]
    records = []
    for number in range(len(input_shards)):
        read = store.read_json(read_name(number))
        records.append(read["records"])
        rejects[number] += map(_rejected, read["rejects"])
        if store.exists(dedup_name(number)):
            rejects[number] += map(_rejected, store.read_json(dedup_name(number))["rejects"])
    for one in done:
        for reject in map(_rejected, one["rejects"]):
            rejects[reject.place[0]].append(reject)

    counts: dict[str, Counter[str]] = {}
    for one in done:
        counts.setdefault(one["entry"]["split"], Counter()).update(one["documents"])
    table: dict[str, Counter[str]] = {}
    inputs = []
    for number, shard in enumerate(input_shards):
        by_reason = Counter(reject.reason for reject in rejects[number])
        inputs.append(shard | {"records": records[number], "rejects": dict(sorted(by_reason.items()))})
        for reject in rejects[number]:
            table.setdefault(reject.source, Counter())[reject.reason] += 1
        if rejects[number]:
            store.write_text(f"rejects/{number:05}.jsonl", _lines(shard["name"], rejects[number]))
    written = sum(sum(part.values()) for part in counts.values())
    rejected = sum(map(len, rejects))
    if sum(records) != written + rejected:
        raise DataError(
            f"{store.url}: {sum(records)} records were read, but {written} written and {rejected} rejected; "
            "did the input change? delete the folder and build it again"
        )
    return {
        "shards": [one["entry"] for one in done if one["entry"]["records"]],
        "input": inputs,
        "counts": {split: dict(sorted(part.items())) for split, part in sorted(counts.items())},
        "rejects": {source: dict(sorted(part.items())) for source, part in sorted(table.items())},
        "statistics": statistics.add_up(one["statistics"] for one in done),
    }


def finished(recipe: Recipe, store: Store) -> frozenset[str]:
    """The files of the output shards that have their marker."""
    return frozenset(
        name.removeprefix(f"{WORK}/done/").removesuffix(".json") for name in _done_names(recipe, store)
    )


def _done_names(recipe: Recipe, store: Store) -> list[str]:
    return [
        f"{WORK}/done/{split}/{name}"
        for split in recipe.splits
        for name in store.names(f"{WORK}/done/{split}")
        if not name.startswith(".")
    ]


def _rejected(fields: list[Any]) -> Rejected:
    place, *rest = fields
    return Rejected(tuple(place), *rest)


def _lines(shard_name: str, rejects: Iterable[Rejected]) -> str:
    return "".join(
        json.dumps(
            {"shard": shard_name, "record": reject.place[1]}
            | dict(zip(Rejected._fields[1:], reject[1:], strict=True))
        )
        + "\n"
        for reject in sorted(rejects)
    )
