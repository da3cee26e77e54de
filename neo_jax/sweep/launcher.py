"""A launcher's file for every cell, for machines other than this one.

The launcher's own flags (`python -m launch render`) say where; config, name and workdir come from the cell.
WORKDIR is then a folder as the machines see it, and the files are written below `--files`, which is here. A
branch's file is to be submitted when its trunk is done: it names a checkpoint of it. `status` gathers the
results that lie in WORKDIR.
"""

import argparse
import pathlib
import re
import shlex

from launch import __main__ as launch
from launch.backends import BACKENDS
from neo_jax import config as config_lib
from neo_jax.errors import UserError
from neo_jax.sweep.local import Sweep

_TAKEN = ("config", "name", "workdir")
_SUFFIXES = {"gke": "yaml"}


def write(sweep: Sweep, flags: str, folder: pathlib.Path) -> list[str]:
    """Writes FOLDER/NAME.yaml or .sh per cell; returns a line for each, in an order that puts trunks first.

    Args:
        flags: of `python -m launch render`, without --config, --name and --workdir.

    Raises:
        UserError: the launcher refuses a cell, or two names become one.
    """
    given = shlex.split(flags)
    for name in _TAKEN:
        if any(flag.split("=")[0] == f"--{name}" for flag in given):
            raise UserError(f"--launch: --{name} is the cell's; leave it out")
    names = {cell.name: job_name(cell.name) for cell in sweep.cells}
    if len(set(names.values())) < len(names):
        raise UserError("--launch: two cells have the same name in lower case with '-' for other characters")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for cell in sweep.cells:
        fields = [f"--config.{field}={text}" for field, text in sweep.fields(cell)]
        own = [f"--config={sweep.file}:{cell.name}", f"--name={names[cell.name]}"]
        args = _parsed([*given, *own, f"--workdir={sweep.run_folder(cell)}", *fields])
        backend = BACKENDS[args.backend]
        path = folder / f"{names[cell.name]}.{_SUFFIXES.get(args.backend, 'sh')}"
        path.write_text(backend.render(launch.job_of(args, backend)))
        lines.append(f"{path}" + (f" after {names[cell.trunk]}" if cell.trunk else ""))
    return lines


def job_name(cell: str) -> str:
    """The name of a cell in a cluster: lower-case letters, digits and '-'."""
    name = re.sub(r"[^a-z0-9]+", "-", cell.lower()).strip("-")
    return name if name[:1].isalpha() else f"run-{name}"


def _parsed(flags: list[str]) -> argparse.Namespace:
    return config_lib.parse(launch._parser(), ["render", *flags])
