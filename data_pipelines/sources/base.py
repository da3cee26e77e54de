"""What every source is: shards of records with random access, and a pure function from record to document."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines import forms, records
from data_pipelines.errors import DataError, Reject
from data_pipelines.schema import Example

_SAMPLE = 100  # documents that are read to estimate the size of all


@dataclasses.dataclass(frozen=True)
class Options:
    """A source as a config describes it; fields as in `configs/base.py: source`."""

    name: str
    kind: str
    path: str  # file, folder, glob or URL
    split: str = "train"
    form: str = "caption"  # one of FORMS
    image_fields: tuple[str, ...] = ()  # () = the usual names
    text_fields: tuple[str, ...] = ()
    image_root: str = ""  # what image paths are relative to; "" = the folder of their file
    index_path: str = "data/index"  # local folder for indices of formats without one

    def __post_init__(self) -> None:
        if self.form not in forms.FORMS:
            raise DataError(
                f"source {self.name}: unknown form {self.form!r}; there are {', '.join(forms.FORMS)}"
            )


class Source:
    """Records of all shards, one after the other. A kind fills in `_open` and `_read`.

    Pickles as its options: a worker process opens the files anew.

    Attributes:
        options: how it was opened.
        shards: their names, for messages; unique, whatever folder the data lies in.
        bounds: int64 [shards + 1], number of the first record of each shard, then that of all records.
        blocks: int64 [n + 1], bounds of stretches that are read as a whole; None if records are read alone.
    """

    blocks: np.ndarray | None = None

    def __init__(self, options: Options):
        self.options = options
        self.name = options.name
        self.shards, counts = self._open()
        self.bounds: np.ndarray = np.append(0, np.cumsum(counts)).astype(np.int64)
        if not len(self):
            raise DataError(f"source {self.name}: {options.path} has no records")

    def _open(self) -> tuple[list[str], Sequence[int]]:
        """Opens the shards; returns their names and numbers of records."""
        raise NotImplementedError

    def _read(self, shard: int, record: int) -> Any:
        """The raw record; raises DataError if the shard cannot be read."""
        raise NotImplementedError

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Returns (number of the shard, number of the record in it)."""
        shard = int(np.searchsorted(self.bounds, index, side="right")) - 1
        return shard, index - int(self.bounds[shard])

    def id_of(self, index: int) -> str:
        """The record's place, "shard#record": unique within the source."""
        shard, record = self.locate(index)
        return f"{self.shards[shard]}#{record}"

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._read(*self.locate(index))

    def example(self, index: int) -> Example:
        """Reads a record as a document. Raises Reject if it is unusable, DataError if its shard is."""
        return self.to_example(self[index], self.id_of(index))

    def to_example(self, raw: Any, id_: str) -> Example:
        """The document of a raw record: a pure function but for images that it names by path."""
        look = forms.Look(
            images=self.options.image_fields or forms.IMAGE_FIELDS,
            texts=self.options.text_fields or forms.TEXT_FIELDS,
            fetch=self.fetch,
        )
        return Example(id_, self.name, tuple(forms.FORMS[self.options.form](self.fields(raw), look)))

    def fields(self, raw: Any) -> forms.Fields:
        """The raw record as named fields. Raises Reject if it has another shape."""
        return raw

    def fetch(self, path: str) -> bytes:
        """Reads an image that a record names by its path. Raises Reject("missing_image")."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """About how much memory all documents take. Estimated from some of them where no file says it."""
        sample = range(0, len(self), -(-len(self) // _SAMPLE))
        return sum(map(self._document_bytes, sample)) * len(self) // len(sample)

    def _document_bytes(self, index: int) -> int:
        try:
            return len(records.to_bytes(self.example(index)))
        except Reject:
            return 0

    @property
    def identity(self) -> str:
        """Changes when the stored records do: shard names and counts, and what a kind adds."""
        fields = [self.options.kind, self.options.form, self.options.split, self.shards, self.bounds.tolist()]
        return hashlib.sha256(json.dumps([fields, self._identity()]).encode()).hexdigest()

    def _identity(self) -> Any:
        return None

    def __reduce__(self) -> tuple[Any, tuple[Options]]:
        return type(self), (self.options,)


def names(urls: Sequence[str]) -> list[str]:
    """Short unique names of files: what is left when the folder they share is cut off."""
    if len(urls) == 1:
        return [urls[0].rpartition("/")[2]]
    shared = 0
    parts = [url.split("/") for url in urls]
    while len({tuple(part[: shared + 1]) for part in parts}) == 1 and all(len(p) > shared + 1 for p in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]
