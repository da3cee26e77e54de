"""What flows through a build."""

import dataclasses
from typing import Any, NamedTuple

from data_pipelines.schema import Example

Place = tuple[int, int]  # (shard, record) of the input; also the order in which duplicates stay


class Kept(NamedTuple):
    """A record that passed the stages."""

    place: Place
    example: Example


class Rejected(NamedTuple):
    """A record that did not; a line of rejects/*.jsonl."""

    place: Place
    id: str
    source: str
    reason: str
    message: str


class Target(NamedTuple):
    """The output shard that a record goes to."""

    split: str
    source: str
    shard: int

    def file(self, num_shards: int) -> str:
        return f"{self.split}/{self.source}-{self.shard:05}-of-{num_shards:05}.array_record"


def as_json(value: Any) -> Any:
    """Recipes as JSON values: the fields of dataclasses, with the class's name as `kind`."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return value
