"""JSON: a list of records as LLaVA writes it (.json) or one per line (.jsonl); images lie in a folder.

A file that begins with "[" is a list, but not if its name ends in .jsonl.
"""

import codecs
import mmap
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from data_pipelines import files, forms
from data_pipelines.errors import DataError, Reject
from data_pipelines.sources.base import Source, names

_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_NO_SPACE = re.compile(rb"[^ \t\r\n]")
# What UTF-16 and UTF-32 begin with; UTF-32's little-endian mark begins with UTF-16's.
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


class JsonSource(Source):
    """A record is the text of one JSON object; the index holds where each starts and ends."""

    def _open(self) -> tuple[list[str], list[int]]:
        self._files = [files.File(url) for url in files.expand(self.options.path, (".json", ".jsonl"))]
        self._spans = [
            files.read_index(file, "json 2", self.options.index_path, _index).reshape(-1, 2)
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
            if data[:4].startswith(_WIDE):
                raise DataError(f"{file.url}: UTF-16 or UTF-32; convert it to UTF-8")
            start = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
            first = _NO_SPACE.search(data, start)
            if first and first[0] == b"[" and not file.url.endswith(".jsonl"):
                spans = _items(file, data, first.start())
            else:
                spans = _lines(data, start)
            return [place for span in spans for place in span]


def _lines(data: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Every line from `start` on that is not blank."""
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
            # Brackets that do not match end it too early.
            rest = match if token == b"}" else _NO_SPACE.search(data, match.end())
            if rest is not None:
                raise DataError(
                    f"{file.url}: neither one list nor JSON lines: the list that it starts with ends before "
                    f"byte {rest.start()}, where {rest[0].decode(errors='replace')!r} follows"
                )
            return
    raise DataError(f"{file.url}: cut off: the list that it starts with does not end")
