"""One output shard: its records in shuffled order, as documents or packed rows, and what to say of them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from data_pipelines.build import flow, shards, state
from data_pipelines.build.items import Kept, Target
from data_pipelines.build.recipe import Recipe
from data_pipelines.build.store import Store
from data_pipelines.schema import Example


def write_target(
    recipe: Recipe,
    store: Store,
    target: Target,
    records: Iterable[Kept],
    tokenizer_json: str,
    sources: list[str],
) -> dict[str, Any]:
    """Writes the shard of a target and its marker; returns the marker's content.

    Nothing is done if the marker is there. The records may come in any order and are sorted here.

    Raises:
        DataError: the disk is full, or the store cannot be written.
    """
    file = target.file(recipe.num_shards)
    marker = state.done_name(recipe, target)
    if store.exists(marker):
        return store.read_json(marker)
    placed = sorted(records, key=lambda kept: (_order(recipe, kept.example), kept.place))
    form = recipe.output.start(tokenizer_json, sources)
    entry = store.write(file, lambda path: shards.write_records(path, form.records(placed)))
    documents = Counter(kept.example.source for kept in placed)
    documents.subtract(reject.source for reject in form.rejects)
    done = {
        "entry": {"file": file, "split": target.split, "source": target.source} | entry,
        "documents": {source: n for source, n in sorted(documents.items()) if n},
        "statistics": form.statistics.to_json(),
        "rejects": [list(reject) for reject in sorted(form.rejects)],
    }
    store.write_json(marker, done)
    return done


def _order(recipe: Recipe, example: Example) -> bytes:
    return flow.order_of(recipe, example.source, example.id)
