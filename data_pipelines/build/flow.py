"""What a build does, as pure functions that know no engine; local.py and beam.py call them.

    read    shard of the input -> records, each through the stages         Kept | Rejected
    dedup   key -> candidates -> losers                                    dedup.py
    target  where a kept record goes: split, source, shard, order in it    by hash of its id
    write   all records of a target, in order -> one file and its entry

Every function is deterministic in its arguments, so both engines write the same bytes, and so does a build
that was killed and started again.
"""

import hashlib
from collections.abc import Iterable, Iterator

import fsspec

from data_pipelines import text
from data_pipelines.build.inputs import InputShard
from data_pipelines.build.items import Kept, Place, Rejected, Target
from data_pipelines.build.recipe import Recipe
from data_pipelines.errors import DataError, Reject
from data_pipelines.schema import Example

ALL_SOURCES = "all"
TOKENIZER = "tokenizer.json"


def read(recipe: Recipe, number: int, shard: InputShard) -> Iterator[Kept | Rejected]:
    """Yields every record of input shard `number`, after the stages."""
    for record, (id_, found) in enumerate(shard.read()):
        source = found.source if isinstance(found, Example) else shard.options.name
        try:
            if isinstance(found, Reject):
                raise found
            for stage in recipe.stages:
                found = stage(found)
        except Reject as reject:
            yield Rejected((number, record), id_, source, reject.reason, str(reject))
        else:
            yield Kept((number, record), found)


def candidates(recipe: Recipe, kept: Kept) -> Iterator[tuple[int, list[bytes], bytes]]:
    """Yields (number of the dedup rule, keys, evidence) of a record, for the rules that have keys for it."""
    for number, rule in enumerate(recipe.dedup):
        keys, evidence = rule.keys(kept.example)
        if keys:
            yield number, keys, evidence


def superfluous(
    recipe: Recipe, rule_number: int, kept_id: str, place: Place, id_: str, source: str
) -> Rejected:
    """A record as it is counted when a dedup rule leaves it out."""
    return Rejected(place, id_, source, recipe.dedup[rule_number].reason, f"{kept_id} came before")


def order_of(recipe: Recipe, source: str, id_: str) -> bytes:
    """16 bytes by which the records of a shard are sorted: a shuffle that ignores the input's order."""
    return hashlib.sha256(f"{recipe.seed}/{source}/{id_}".encode()).digest()[:16]


def target_of(recipe: Recipe, source: str, order: bytes) -> Target:
    """The output shard of a record; its split and shard come from other bits of `order` than its rank."""
    split = "val" if int.from_bytes(order[8:12]) < recipe.holdout * 2**32 else "train"
    source = source if recipe.output.form == "examples" else ALL_SOURCES
    return Target(split, source, int.from_bytes(order[12:]) % recipe.num_shards)


def make_tokenizer(recipe: Recipe, sample: Iterable[Example]) -> str:
    """The tokenizer.json of a build: the recipe's file, or one trained on the sample.

    Raises DataError if the file cannot be read.
    """
    if isinstance(recipe.tokenizer, int):
        return text.train_tokenizer(
            sorted({span.text for example in sample for span in example.texts}), recipe.tokenizer
        )
    try:
        with fsspec.open(recipe.tokenizer, encoding="utf-8", mode="rt") as file:
            return file.read()
    except OSError as error:
        raise DataError(
            f"recipe {recipe.name}: cannot read its tokenizer {recipe.tokenizer}: {error}"
        ) from error
