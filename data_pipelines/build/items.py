"""What flows through a build."""

from typing import NamedTuple

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
