"""Parquet: rows with image bytes and a caption (LAION, DataComp) or Hugging Face's {"bytes", "path"} structs.

A row cannot be read alone: a row group is read as a whole and the last few are kept; `blocks` tells the
shuffle.
"""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import files, forms
from data_pipelines.errors import DataError, Reject
from data_pipelines.shuffle import BLOCKS_AT_ONCE
from data_pipelines.sources.base import Source, names


class ParquetSource(Source):
    """A record is one row. The index is the files' own: rows per row group."""

    def _open(self) -> tuple[list[str], list[int]]:
        self._files = [files.File(url) for url in files.expand(self.options.path, (".parquet",))]
        self._cache: collections.OrderedDict[tuple[int, int], pa.Table] = collections.OrderedDict()
        groups = [self._row_groups(file) for file in self._files]
        self._groups: list[np.ndarray] = [
            np.append(0, np.cumsum([rows for rows, _ in of])).astype(np.int64) for of in groups
        ]
        self._num_bytes = sum(size for of in groups for _, size in of)
        firsts = np.cumsum([0, *(groups[-1] for groups in self._groups)])
        parts = [groups[:-1] + first for groups, first in zip(self._groups, firsts, strict=False)]
        self.blocks = np.append(np.concatenate(parts), firsts[-1]).astype(np.int64)
        return names([file.url for file in self._files]), [int(groups[-1]) for groups in self._groups]

    def _row_groups(self, file: files.File) -> list[tuple[int, int]]:
        """Rows and bytes, not compressed, of every row group."""
        try:
            with file.open() as stream:
                metadata = pq.ParquetFile(stream).metadata
                groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
                return [(group.num_rows, group.total_byte_size) for group in groups]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file.url}: damaged, or not Parquet: {error}") from error

    def _read(self, shard: int, record: int) -> forms.Fields:
        groups = self._groups[shard]
        group = int(np.searchsorted(groups, record, side="right")) - 1
        return _Row(self._table(shard, group), record - int(groups[group]))

    def _table(self, shard: int, group: int) -> pa.Table:
        file, key = self._files[shard], (shard, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        file.check()
        try:
            with file.open() as stream:
                table = pq.ParquetFile(stream).read_row_group(group)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file.url}: row group {group} cannot be read: {error}") from error
        self._cache[key] = table
        if len(self._cache) > BLOCKS_AT_ONCE:
            self._cache.popitem(last=False)
        return table

    def fields(self, raw: forms.Fields) -> forms.Fields:
        if isinstance(raw.get("json"), str | bytes):  # img2dataset's metadata column
            return collections.ChainMap({"json": forms.parse_json(raw["json"])}, raw)  # type: ignore[arg-type]
        return raw

    def fetch(self, path: str) -> bytes:
        if not self.options.image_root:
            raise Reject("missing_image", f"{path}: the row has no image bytes, only a path")
        try:
            return files.File(f"{self.options.image_root}/{path}").read()
        except DataError as error:
            raise Reject("missing_image", str(error)) from error

    @property
    def num_bytes(self) -> int:
        return super().num_bytes if self.options.image_root else self._num_bytes

    def _identity(self) -> list[int]:
        return [file.size for file in self._files]


class _Row(Mapping[str, Any]):
    """A row whose columns become Python values when they are asked for.

    Valid ones need not have any, as a time in nanoseconds: that must not matter where no form looks.
    """

    def __init__(self, table: pa.Table, row: int):
        self._table, self._row = table, row
        self._columns = {name: i for i, name in enumerate(table.column_names)}

    def __getitem__(self, name: str) -> Any:
        column = self._table.column(self._columns[name])
        try:
            return column[self._row].as_py()
        except UnicodeDecodeError as error:
            raise Reject("bad_text", f"column {name} is not UTF-8: {error}") from error
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise Reject("bad_record", f"column {name} cannot be read: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)
