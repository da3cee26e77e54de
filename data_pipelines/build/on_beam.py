"""The Beam engine: the same functions on any runner of Apache Beam (Direct, Flink, Spark, Dataflow).

    input shards -> read -> stages -> kept ---------------------------+-> by place -> by target -> write
                                  \\-> keys -> by key -> losers -> by place -/

Beam groups and shuffles, which may be more than memory holds; the files that it writes are those of local.py.
Output shards that have their marker are neither shuffled nor written again.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data_pipelines.build import dedup, flow, recipes, state
from data_pipelines.build.inputs import InputShard
from data_pipelines.build.items import Kept, Place, Rejected, Target
from data_pipelines.build.recipe import Recipe
from data_pipelines.build.store import Store
from data_pipelines.build.write import write_target
from data_pipelines.errors import DataError
from data_pipelines.records import from_bytes, to_bytes

try:
    import apache_beam as beam
    import grpc
    from apache_beam.internal.cloudpickle import cloudpickle
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise DataError(
        "--runner=beam needs Apache Beam: pip install -e '.[beam]', then "
        "pip install --no-deps apache-beam==2.77.0"
    ) from error

# Records travel as (place, bytes): plain values, which Beam encodes the same way everywhere.
_Record = tuple[Place, bytes]


def run(recipe: Recipe, input_shards: Sequence[InputShard], store: Store, flags: Sequence[str]) -> None:
    """Brings the build to the point where every shard has its marker.

    Args:
        recipe: what to do.
        input_shards: see inputs.py.
        store: a folder that every worker of the runner can reach.
        flags: of Beam, as in ["--runner=FlinkRunner", "--flink_master=..."].

    Raises:
        DataError: the cluster cannot be reached, or something failed on it.
    """
    for module in recipes.modules():  # recipe files go to the workers with the pipeline
        cloudpickle.register_pickle_by_value(module)
    try:
        with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
            _transforms(pipeline, recipe, input_shards, store)
    except grpc.FutureTimeoutError as error:
        raise DataError(f"no job server answers ({' '.join(flags)})") from error
    except (RuntimeError, grpc.RpcError) as error:  # the last line of a long text is what a worker raised
        raise DataError(f"Beam: {str(error).strip().splitlines()[-1]}") from error


def _transforms(
    pipeline: beam.Pipeline, recipe: Recipe, input_shards: Sequence[InputShard], store: Store
) -> None:
    kept = (
        pipeline
        | "input shards" >> beam.Create(list(enumerate(input_shards)))
        | "spread" >> beam.Reshuffle()
        | "read" >> beam.FlatMap(_read, recipe, store.url)
    )
    lost = (
        kept
        | "keys" >> beam.FlatMap(_keys, recipe)
        | "by key" >> beam.GroupByKey()
        | "losers" >> beam.FlatMap(_losers, recipe)
        | "first rule" >> beam.CombinePerKey(min)
    )
    by_place = {"kept": kept, "lost": lost} | "by place" >> beam.CoGroupByKey()
    survivors = by_place | "survivors" >> beam.FlatMap(_survivors)
    (
        by_place
        | "superfluous" >> beam.FlatMap(_superfluous, recipe)
        | "by input shard" >> beam.GroupByKey()
        | "count superfluous" >> beam.Map(_write_dedup, store.url)
    )
    sources = (
        survivors
        | "source" >> beam.Map(lambda record: from_bytes(record[1]).source)
        | "sources" >> beam.combiners.ToSet()  # few: one per data set
    )
    if isinstance(recipe.tokenizer, int):
        sample = (
            survivors
            | "ordered" >> beam.Map(_ordered, recipe)
            | "sample" >> beam.combiners.Top.Smallest(recipe.tokenizer_documents)
        )
        tokenizer = sample | "train tokenizer" >> beam.Map(_make_tokenizer, recipe, store.url)
    else:  # a file of this machine
        tokenizer = pipeline | "tokenizer" >> beam.Create([_make_tokenizer([], recipe, store.url)])
    (
        survivors
        | "target" >> beam.FlatMap(_to_target, recipe, state.finished(recipe, store))
        | "by target" >> beam.GroupByKey()
        | "write"
        >> beam.Map(
            _write,
            recipe,
            store.url,
            beam.pvalue.AsSingleton(tokenizer),
            beam.pvalue.AsSingleton(sources),
        )
    )


def _read(numbered_shard: tuple[int, InputShard], recipe: Recipe, url: str) -> Iterator[_Record]:
    number, shard = numbered_shard
    rejects, num_kept = [], 0
    for one in flow.read(recipe, number, shard):
        if isinstance(one, Rejected):
            rejects.append(one)
        else:
            num_kept += 1
            yield one.place, to_bytes(one.example)
    state.write_read(Store(url), number, num_kept + len(rejects), rejects)


def _keys(record: _Record, recipe: Recipe) -> Iterator[tuple[tuple[int, bytes], tuple[Place, str, bytes]]]:
    kept = Kept(record[0], from_bytes(record[1]))
    for rule_number, keys, evidence in flow.candidates(recipe, kept):
        for key in keys:
            yield (rule_number, key), (kept.place, kept.example.id, evidence)


def _losers(
    group: tuple[tuple[int, bytes], Iterable[Any]], recipe: Recipe
) -> Iterator[tuple[Place, tuple[int, str]]]:
    (rule_number, _), members = group
    for loser in dedup.losers(recipe.dedup[rule_number], map(dedup.Candidate._make, members)):
        yield loser.place, (rule_number, loser.kept)


def _survivors(grouped: tuple[Place, dict[str, Any]]) -> Iterator[_Record]:
    place, found = grouped
    if not list(found["lost"]):
        yield from ((place, record) for record in found["kept"])


def _superfluous(grouped: tuple[Place, dict[str, Any]], recipe: Recipe) -> Iterator[tuple[int, Rejected]]:
    place, found = grouped
    for rule_number, kept_id in found["lost"]:
        for record in found["kept"]:
            example = from_bytes(record)
            reject = flow.superfluous(recipe, rule_number, kept_id, place, example.id, example.source)
            yield place[0], reject


def _write_dedup(group: tuple[int, Iterable[Any]], url: str) -> None:
    number, rejects = group
    state.write_dedup(Store(url), number, map(Rejected._make, rejects))


def _ordered(record: _Record, recipe: Recipe) -> tuple[bytes, Place, bytes]:
    place, data = record
    example = from_bytes(data)
    words = dataclasses.replace(example, spans=example.texts)  # the sample is in one worker's memory
    return flow.order_of(recipe, example.source, example.id), place, to_bytes(words)


def _make_tokenizer(sample: list[tuple[bytes, Place, bytes]], recipe: Recipe, url: str) -> str:
    tokenizer = flow.make_tokenizer(recipe, (from_bytes(data) for _, _, data in sample))
    Store(url).write_text(flow.TOKENIZER, tokenizer)
    return tokenizer


def _to_target(
    record: _Record, recipe: Recipe, finished: frozenset[str]
) -> Iterator[tuple[tuple[str, str, int], _Record]]:
    example = from_bytes(record[1])
    order = flow.order_of(recipe, example.source, example.id)
    target = flow.target_of(recipe, example.source, order)
    if target.file(recipe.num_shards) not in finished:
        yield (target.split, target.source, target.shard), record


def _write(
    group: tuple[tuple[str, str, int], Iterable[_Record]],
    recipe: Recipe,
    url: str,
    tokenizer: str,
    sources: set[str],
) -> None:
    target, records = group
    kept = (Kept(place, from_bytes(data)) for place, data in records)
    write_target(recipe, Store(url), Target._make(target), kept, tokenizer, sorted(sources))
