"""The input of a build: shards of the online sources, one after the other."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.errors import DataError, Reject
from data_pipelines.schema import Example
from data_pipelines.sources import SOURCES, Options, Source, open_source

_INPUT = re.compile(r"(?:(?P<name>\w[\w.-]*)=)?(?P<kind>\w+):(?P<path>.+)")


@dataclasses.dataclass(frozen=True)
class InputShard:
    """The records start..end-1 of a source, all of them in one of its shards. Picklable and hashable."""

    options: Options
    name: str
    start: int
    end: int

    def read(self) -> Iterator[tuple[str, Example | Reject]]:
        """Yields (id, document or why it is none) of every record.

        Raises DataError if the shard cannot be read.
        """
        source = _open(self.options)
        for index in range(self.start, self.end):
            try:
                example = source.example(index)
            except Reject as reject:
                yield source.id_of(index), reject
            else:
                yield example.id, example

    def describe(self) -> dict[str, Any]:
        return {"source": self.options.name, "name": self.name}


def parse(spec: str, form: str = "caption", split: str = "train") -> Options:
    """Reads "[NAME=]KIND:PATH", as in "cc12m=webdataset:gs://bucket/cc12m/*.tar".

    Args:
        spec: NAME, under which its losses and rejects are counted, is "input" if left out.
        form: how fields become a document, see data_pipelines/forms.py.
        split: of data sets that have splits.

    Raises:
        DataError: it does not read like that, or there is no such kind.
    """
    match = _INPUT.fullmatch(spec)
    if match is None or match["kind"] not in SOURCES:
        raise DataError(f"--input={spec}: write [NAME=]KIND:PATH, where KIND is one of {', '.join(SOURCES)}")
    path = match["path"] if "://" in match["path"] else _absolute(match["path"])
    index_path = _absolute(Options.index_path)
    return Options(match["name"] or "input", match["kind"], path, split, form, index_path=index_path)


def _absolute(path: str) -> str:
    """Workers on a cluster are in other folders than the command was."""
    return os.path.abspath(os.path.expanduser(path))


def list_shards(inputs: Sequence[Options]) -> list[InputShard]:
    """Every shard of every input, in the order in which duplicates stay.

    Raises DataError if two inputs have one name, or one cannot be opened.
    """
    names = [options.name for options in inputs]
    if len(set(names)) < len(names):
        raise DataError(f"two inputs have one name among {', '.join(names)}; write NAME=KIND:PATH")
    shards = []
    for options in inputs:
        source = _open(options)
        for number, name in enumerate(source.shards):
            start, end = source.bounds[number : number + 2].tolist()
            shards.append(InputShard(options, name, start, end))
    return shards


def identity(inputs: Sequence[Options]) -> dict[str, str]:
    """Name of each input -> a hash that changes when its stored records do."""
    return {options.name: _open(options).identity for options in inputs}


def num_bytes(inputs: Sequence[Options]) -> int:
    """About how much memory the documents of every input take together."""
    return sum(_open(options).num_bytes for options in inputs)


@functools.lru_cache(maxsize=8)
def _open(options: Options) -> Source:
    return open_source(options)
