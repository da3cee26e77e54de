"""Where a build writes: a local folder or an fsspec URL. A file appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from data_pipelines.errors import DataError

WORK = ".build"  # what an unfinished build keeps, see state.py


class Store:
    """A folder; names are relative paths. Errors of the file system become DataErrors that name the file."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        protocol, path = fsspec.core.split_protocol(self.url)
        self.local = protocol in (None, "file")
        if self.local:
            self.url = os.path.abspath(path)

    def path(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def exists(self, name: str) -> bool:
        with self._errors("read", name):
            return self._fs.exists(self.path(name))

    def names(self, folder: str = "") -> list[str]:
        """The files and folders directly in `folder`, sorted; empty if there is no such folder."""
        with self._errors("read", folder):
            self._fs.invalidate_cache()
            if not self._fs.isdir(self.path(folder)):
                return []
            return sorted(
                path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self.path(folder), detail=False)
            )

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise DataError(f"{self.path(name)}: not JSON ({error}); delete it to write it again") from error

    def read_bytes(self, name: str) -> bytes:
        with self._errors("read", name):
            return self._fs.cat_file(self.path(name))

    def write_text(self, name: str, text: str) -> None:
        """Writes a file whole."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1, sort_keys=True) + "\n")

    def write(self, name: str, make: Callable[[Path], Any]) -> Any:
        """Has `make` write a local file, then puts it in place. Returns what `make` returns.

        A temporary file that a killed process leaves lies in WORK, which goes when a build is finished.
        """
        with self._errors("write", name):
            self._fs.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True)
            folder = self.path(f"{WORK}/tmp") if self.local else None  # of one file system with its goal
            if folder:
                os.makedirs(folder, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=folder)
            os.close(handle)
            try:
                result = make(Path(temporary))
                if self.local:
                    os.chmod(temporary, 0o644)
                    os.replace(temporary, self.path(name))
                else:
                    self._fs.put_file(temporary, self.path(name))
            finally:
                Path(temporary).unlink(missing_ok=True)
            return result

    def delete(self, name: str) -> None:
        """Removes a file or a folder with all it holds."""
        with self._errors("delete", name):
            if self.local and os.path.isdir(self.path(name)):
                shutil.rmtree(self.path(name))
            elif self._fs.exists(self.path(name)):
                self._fs.rm(self.path(name), recursive=True)

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.url)[0]

    @contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot {verb} {self.path(name)}: {error.strerror or error}") from error
