"""JSON: a list of records as LLaVA writes it (.json) or one per line (.jsonl); images lie in a folder."""

import mmap
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from data_pipelines import files, forms
from data_pipelines.errors import DataError, Reject
from data_pipelines.sources.base import Source, names

_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_SPACE = b" \t\r\n"


class JsonSource(Source):
    """A record is the text of one JSON object; the index holds where each starts and ends."""

    def _open(self) -> tuple[list[str], list[int]]:
        self._files = [files.File(url) for url in files.expand(self.options.path, (".json", ".jsonl"))]
        self._spans = [
            files.read_index(file, "json", self.options.index_path, _index).reshape(-1, 2)
            for file in self._files
        ]
        self._root = self.options.image_root or self._files[0].url.rpartition("/")[0]
        return names([file.url for file in self._files]), [len(spans) for spans in self._spans]

    def _read(self, shard: int, record: int) -> bytes:
        start, end = self._spans[shard][record].tolist()
        return self._files[shard].read(start, end)

    def fields(self, raw: bytes) -> forms.Fields:
        fields = forms.parse_json(raw)
        if not isinstance(fields, dict):
            raise Reject("bad_json", f"a record is {type(fields).__name__}, not an object")
        return fields

    def fetch(self, path: str) -> bytes:
        url = path if "://" in path or path.startswith("/") else f"{self._root}/{path}"
        try:
            return files.File(url).read()
        except DataError as error:
            raise Reject("missing_image", str(error)) from error

    def _identity(self) -> list[Any]:
        return [[file.size for file in self._files]]


def _index(file: files.File) -> list[int]:
    """Start and end of every record, flat. Raises DataError if it is no list and no lines of objects."""
    with file.open() as stream, tempfile.TemporaryFile() as copy:
        while block := stream.read(1 << 24):
            copy.write(block)
        copy.flush()
        if not file.size:
            raise DataError(f"{file.url}: an empty file")
        with mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = next((i for i in range(len(data)) if data[i] not in _SPACE), len(data))
            is_list = data[start : start + 1] == b"["
            spans = _items(file, data, start) if is_list else _lines(data)
            return [place for span in spans for place in span]


def _lines(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Every line that is not blank."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            yield start, end
        start = end + 1


def _items(file: files.File, data: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Every item of the list that starts at `start`, by its brackets alone."""
    depth, item = 0, start + 1
    for match in _STRUCTURE.finditer(data, start):
        token = match[0]
        if token in (b"[", b"{"):
            depth += 1
        elif token in (b"]", b"}"):
            depth -= 1
        if (depth == 1 and token == b",") or (depth == 0 and token == b"]"):
            if data[item : match.start()].strip():
                yield item, match.start()
            item = match.end()
        if depth == 0:
            return
    raise DataError(f"{file.url}: cut off: the list that it starts with does not end")
