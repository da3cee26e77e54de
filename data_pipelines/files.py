"""Files of a source, on this machine or behind a URL that fsspec knows (gs://, s3://, hf://, memory://)."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from data_pipelines.errors import DataError

_CHEAP = {"file", "local", "memory"}  # looked at before every read
_CHECK_EVERY = 256  # reads between two looks at a remote file: a look costs as much as reading it


def file_system(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a path or URL, and the path in it.

    Raises DataError if the URL's protocol is unknown or needs a package that is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error


def expand(url: str, suffixes: Sequence[str]) -> list[str]:
    """Returns the files that a file, a folder (all files in it with one of `suffixes`) or a glob stands for.

    Sorted. Raises DataError if there are none.
    """
    system, path = file_system(url)
    try:
        if any(letter in path for letter in "*?["):
            found = system.glob(path)
        elif system.isdir(path):
            found = [name for name in system.find(path) if name.endswith(tuple(suffixes))]
        else:
            found = [path] if system.exists(path) else []
    except (OSError, ValueError) as error:
        raise DataError(f"{url}: cannot be listed: {error}") from error
    if not found:
        raise DataError(f"{url}: no such file, or a folder without {', '.join(suffixes)} files")
    return sorted(system.unstrip_protocol(name).removeprefix("file://") for name in found)


class File:
    """One file, read by ranges of bytes. Raises DataError when it is missing, short or no longer the same."""

    def __init__(self, url: str):
        self.url = url
        self._system, self._path = file_system(url)
        protocol = self._system.protocol
        protocols = {protocol} if isinstance(protocol, str) else {*protocol}
        self._cheap, self._local = bool(protocols & _CHEAP), "file" in protocols
        self._reads = 0
        self._stamp = self._stat()
        self.size, self.version = self._look()

    def _look(self) -> tuple[int, str]:
        """Size, and a text that changes with the file."""
        try:
            info = self._system.info(self._path)
        except (OSError, ValueError) as error:  # ValueError: a path with \0 or half a surrogate pair
            raise DataError(f"{self.url}: missing or unreadable: {error}") from error
        names = ("mtime", "ETag", "etag", "created", "updated", "LastModified")
        return int(info["size"]), str([info[name] for name in names if name in info])

    def _stat(self) -> tuple[int, ...] | None:
        """What changes with a file on this machine, without fsspec's detours; None elsewhere."""
        try:
            found = os.stat(self._path) if self._local else None
        except (OSError, ValueError):
            return None
        return found and (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def check(self) -> None:
        """Raises DataError if the file is not the one that was opened."""
        if self._stamp is not None and self._stat() == self._stamp:
            return
        if self._look() != (self.size, self.version):
            raise DataError(
                f"{self.url}: changed while it was being read; data must stay as it is for the whole run"
            )

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """Returns bytes start..end, to the file's end by default."""
        end = self.size if end is None else end
        if self._cheap or self._reads % _CHECK_EVERY == 0:
            self.check()
        self._reads += 1
        try:
            if self._local:
                with open(self._path, "rb") as stream:
                    stream.seek(start)
                    data = stream.read(end - start)
            else:
                data = self._system.cat_file(self._path, start=start, end=end)
        except OSError as error:
            raise DataError(f"{self.url}: cannot be read: {error}") from error
        if len(data) != end - start:
            raise DataError(f"{self.url}: ends at byte {start + len(data)} instead of {end}: cut off")
        return data

    def open(self) -> Any:
        """Returns a seekable binary file object, for libraries that want one."""
        try:
            return self._system.open(self._path, "rb")
        except OSError as error:
            raise DataError(f"{self.url}: cannot be read: {error}") from error


def read_index(
    file: File, kind: str, folder: str | Path, build: Callable[[File], Sequence[int]]
) -> np.ndarray:
    """Returns the int64 index of a file whose format has none, mapped from disk; built once per version.

    Args:
        file: what is indexed.
        kind: of index; part of the cache's file name, so a new one where `build` has come to do other things.
        folder: local folder of the cache.
        build: makes the index, by reading the whole file.
    """
    identity = f"{kind}|{file.url}|{file.size}|{file.version}"
    path = Path(folder) / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
    if not path.exists():
        index = np.array(build(file), np.int64)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
                np.save(partial, index)
            os.replace(partial.name, path)
        except OSError as error:
            raise DataError(f"{path}: the index of {file.url} cannot be written: {error}") from error
    return np.load(path, mmap_mode="r" if os.path.getsize(path) > 1 << 20 else None)
