"""ArrayRecord: what our own build writes. A record is an `Example`; every record can be read alone."""

import functools
from typing import Any

from array_record.python import array_record_data_source

from data_pipelines import files, records
from data_pipelines.errors import DataError, Reject
from data_pipelines.schema import Example
from data_pipelines.sources.base import Source, names


class ArrayRecordSource(Source):
    """Shards of `records.to_bytes`; they keep the ids and source names they were built with.

    ArrayRecord's own reader opens local paths, and gs:// where it was built with that.
    """

    suffixes = (".array_record", ".arrayrecord", ".riegeli")

    def _open(self) -> tuple[list[str], list[int]]:
        self._urls = files.expand(self.options.path, self.suffixes)
        self._files = [files.File(url) for url in self._urls]
        self._shard = functools.lru_cache(maxsize=256)(self._open_shard)
        return names(self._urls), [len(self._shard(i)) for i in range(len(self._urls))]

    def _open_shard(self, shard: int) -> Any:
        url = self._urls[shard]
        try:
            return array_record_data_source.ArrayRecordDataSource(url)
        except Exception as error:  # the reader raises many kinds
            raise DataError(f"{url}: not a readable ArrayRecord file: {_line(error)}") from error

    def _read(self, shard: int, record: int) -> bytes:
        self._files[shard].check()
        try:
            return self._shard(shard)[record]
        except Exception as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self._urls[shard]}: record {record} cannot be read: {_line(error)}; the shard is damaged"
            ) from error

    def to_example(self, raw: bytes, id_: str) -> Example:
        example = records.from_bytes(raw)
        if not example.spans:
            raise Reject("empty", "neither text nor image")
        return example

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self._files)

    def _identity(self) -> list[int]:
        return [file.size for file in self._files]


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
