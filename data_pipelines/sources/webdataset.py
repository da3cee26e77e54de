"""Tar shards as img2dataset and webdataset write them: 000.jpg 000.txt 000.json, 001.jpg ...

Members whose names agree up to the first dot of the last part are one record; what follows the dot names the
field ("seg.png" of 000.seg.png). Members of a record follow one another.
"""

import io
import re
import tarfile
from typing import Any

from data_pipelines import files, forms
from data_pipelines.errors import DataError, Reject
from data_pipelines.sources.base import Source, names

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key, field


class WebDatasetSource(Source):
    """A record is the bytes of its members in the tar; the index holds where each record starts."""

    def _open(self) -> tuple[list[str], list[int]]:
        self._files = [files.File(url) for url in files.expand(self.options.path, (".tar",))]
        self._offsets = [
            files.read_index(file, "webdataset 2", self.options.index_path, _offsets) for file in self._files
        ]
        return names([file.url for file in self._files]), [len(offsets) - 1 for offsets in self._offsets]

    def _read(self, shard: int, record: int) -> bytes:
        start, end = self._offsets[shard][record : record + 2].tolist()
        return self._files[shard].read(start, end)

    def fields(self, raw: bytes) -> forms.Fields:
        """Members by name: `json` parsed, the others as bytes."""
        fields: dict[str, Any] = {}
        for name, content in _plain_members(raw) or _any_members(raw):
            if match := _NAME.fullmatch(name):
                fields[match[2].lower()] = content
        if "json" in fields:
            fields["json"] = forms.parse_json(fields["json"])
        return fields

    def fetch(self, path: str) -> bytes:
        raise Reject("missing_image", f"{path} is not in the tar")

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self._files)

    def _identity(self) -> list[int]:
        return [file.size for file in self._files]


def _any_members(raw: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of the files in a stretch of a tar. Raises Reject if it is damaged."""
    members = []
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    members.append((member.name, content.read()))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise Reject("bad_record", f"damaged tar members: {error}") from error
    return members


def _plain_members(raw: bytes) -> list[tuple[str, bytes]] | None:
    """The same in a fifth of the time; None if there is a member that is not the usual kind, or damaged."""
    members, at = [], 0
    while at < len(raw):
        header, start = raw[at : at + tarfile.BLOCKSIZE], at + tarfile.BLOCKSIZE
        try:
            size, checksum = (
                int(field.partition(b"\0")[0], 8) for field in (header[124:136], header[148:156])
            )
        except ValueError:
            return None
        end = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        # The checksum counts itself as eight blanks.
        if sum(header) - sum(header[148:156]) + 256 != checksum or not start <= end <= len(raw):
            return None
        kind, content = header[156:157], raw[start : start + size]
        if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) and not header[345]:  # there a long name would begin
            name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
            if name.endswith("/"):
                return None
            members.append((name, content))
        elif kind != tarfile.XHDTYPE or not (time := _TIME.fullmatch(content)) or int(time[1]) != size:
            return None
        at = end
    return members


_TIME = re.compile(rb"(\d+) mtime=[\d.]+\n")  # attributes that webdataset writes before every member


def _offsets(file: files.File) -> list[int]:
    """Where each record starts, and where the last one ends. Raises DataError if the tar is damaged."""
    offsets: list[int] = []
    key, end = None, 0
    try:
        with file.open() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                match = _NAME.fullmatch(member.name) if member.isfile() else None
                # A long name lies in a member of its own before: the record starts where that one does.
                if match is not None and match[1] != key:
                    offsets.append(end)
                    key = match[1]
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all members it has seen
                if end > file.size:
                    raise DataError(
                        f"{file.url}: damaged or cut off: {member.name} ends at byte {end} of {file.size}"
                    )
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{file.url}: not a tar: {error}") from error
    _check_tail(file, end)
    if not offsets:
        raise DataError(f"{file.url}: a tar without records (members named KEY.FIELD)")
    return [*offsets, end]


# Two blocks of zeros end a tar; then it is padded, to 10 kB by default.
_MOST_ZEROS = (1 << 20) + 2 * tarfile.BLOCKSIZE


def _check_tail(file: files.File, end: int) -> None:
    """Raises DataError if a tar's end is followed by anything but some zeros: tarfile stops at the first."""
    for start in range(end, file.size, _MOST_ZEROS):
        tail = file.read(start, min(start + _MOST_ZEROS, file.size))
        if rest := tail.lstrip(b"\0"):
            at = start + len(tail) - len(rest)
            if at < end + tarfile.BLOCKSIZE:
                raise DataError(f"{file.url}: damaged at byte {end}: no tar member starts there")
            raise DataError(
                f"{file.url}: damaged, or several tars in one file: zeros at byte {end} end the tar, "
                f"but byte {at} is none; write it anew"
            )
    if file.size - end > _MOST_ZEROS:
        raise DataError(
            f"{file.url}: nothing but zeros from byte {end} to its end at {file.size}: its download did not "
            "finish, or its end is lost; fetch it again"
        )
