"""A run's folder: who it belongs to, and what is recorded about the run in it."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
import subprocess
import uuid
from typing import Any

from ml_collections import FrozenConfigDict

from neo_jax import config as config_lib
from neo_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "tokenizers")

# Environment variables that change what the compilers make of a run, and the name that launch/ gives them.
_FLAGS = ("NEO_JAX_FLAGS", "LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL")

# Fields that say where and how a run is computed, not what: it may go on with others.
_WHERE = re.compile(
    r"mesh\.|train\.((start|hang|silence)_timeout_s|local_(folder|every))|stage\.\w+\.accumulate:"
)


def claim(workdir: pathlib.Path, config: FrozenConfigDict) -> None:
    """Makes the folder and writes config.json into it, or checks that it belongs to the same config.

    The mesh may be another one: a run goes on with any number of devices and processes. The compilers' flags
    are recorded, those of the first start and then all others that it goes on with.

    Raises:
        UserError: the folder holds a run of another config (the fields are listed), or is no folder.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from error
    path = workdir / "config.json"
    if path.exists():
        if changes := differences(load_config(workdir), config):
            raise UserError(
                f"--workdir={workdir} holds a run of another config; use another, or take these back: "
                + "; ".join(changes)
            )
        record = json.loads(path.read_text())
        if record.get("flags", [{}])[-1] != _flags():
            record["flags"] = [*record.get("flags", []), _flags()]
            _write(path, record)
        return
    record = {
        "run": uuid.uuid4().hex[:12],
        "config": json.loads(config_lib.to_json(config)),
        "config_hash": config_lib.config_hash(config),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git_revision": _git_revision(),
        "flags": [_flags()],
    }
    _write(path, record)


def check_shared(workdir: pathlib.Path, run: str) -> None:
    """Raises UserError unless this process finds the run there that process 0 claimed the folder for."""
    if not (workdir / "config.json").is_file() or run_id(workdir) != run:
        raise UserError(
            f"--workdir={workdir} is not shared: what process 0 wrote into it is not there on this host; "
            "name a folder that all hosts mount"
        )


def check_writable(workdir: pathlib.Path) -> None:
    """Raises UserError unless this process can write checkpoints, as it will have to after many steps."""
    folder = workdir / "checkpoints"
    file = folder / f"written-by-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        file.write_text("a test, to be deleted")
        file.unlink()
    except OSError as error:
        raise UserError(f"{folder}: no checkpoint can be written there: {error.strerror}") from error


def differences(old: FrozenConfigDict, new: FrozenConfigDict) -> list[str]:
    """As `config.diff`, of the fields that say what is computed."""
    return [change for change in config_lib.diff(old, new) if not _WHERE.match(change)]


def run_id(workdir: pathlib.Path) -> str:
    """What tells this run from all others, also from an earlier one in the same folder."""
    return json.loads((workdir / "config.json").read_text())["run"]


def _flags() -> dict[str, str]:
    return {name: os.environ[name] for name in _FLAGS if name in os.environ}


def _write(path: pathlib.Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.rename(path)


def load_config(workdir: pathlib.Path) -> FrozenConfigDict:
    """The resolved config of a run.

    Raises:
        UserError: the folder holds no run, or its config.json is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no run (no config.json); train one with --workdir={workdir}")
    try:
        return config_lib.from_json(json.dumps(json.loads(path.read_text())["config"]))
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); restore it or use another workdir") from error


def _git_revision() -> str | None:
    """The commit of this source tree, marked "+changes" if it differs; None outside a checkout."""
    root = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
