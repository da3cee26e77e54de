"""Sweeps: many runs from one file, and a table of what came out.

    python -m neo_jax.sweep expand --config=configs/sweeps/X.py --workdir=DIR   # name the runs
    python -m neo_jax.sweep run    --config=configs/sweeps/X.py --workdir=DIR   # run them, or go on
    python -m neo_jax.sweep status --config=configs/sweeps/X.py --workdir=DIR   # how far they are, in a table

--config.FIELD=VALUE changes a field of every cell.
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from neo_jax import config as config_lib
from neo_jax.errors import EXIT_OK, EXIT_USER_ERROR, UserError, main_guard
from neo_jax.sweep import cells, local, table
from neo_jax.sweep.local import Sweep


def main(argv: Sequence[str]) -> int:
    args = config_lib.parse(_parser(), argv)
    sweep = Sweep(args.config, cells.load(args.config), args.workdir, args.overrides)
    return {"expand": expand, "run": run, "status": status}[args.command](sweep, args)


def expand(sweep: Sweep, args: argparse.Namespace) -> int:
    """Prints a command per cell, or writes a launcher's file for each; first builds all configs."""
    for cell in sweep.cells:
        sweep.config(cell)
    if args.launch is None:
        for cell in sweep.cells:
            print(f"{cell.name}: {' '.join(sweep.command(cell))}")
        return EXIT_OK
    from neo_jax.sweep import launcher  # needs the launcher's packages

    print("\n".join(launcher.write(sweep, args.launch, args.files or sweep.workdir / "launch")))
    return EXIT_OK


def run(sweep: Sweep, args: argparse.Namespace) -> int:
    """Runs what has not ended, and writes the table whenever a cell has."""
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: at least 1")
    local.check(sweep)
    code = local.run(sweep, jobs=args.jobs, retry=args.retry, after_each=lambda: _written(sweep), say=_say)
    rows = table.write(sweep)
    _report(sweep, rows, as_json=args.json)
    if code == EXIT_OK and any(row["status"] in (local.FAILED, local.BLOCKED) for row in rows):
        return EXIT_USER_ERROR
    return code


def status(sweep: Sweep, args: argparse.Namespace) -> int:
    """Prints where every cell stands, and writes the table; may be asked while the sweep runs, anywhere."""
    local.check(sweep)
    rows = table.write(sweep)
    for row in rows:
        loss = "" if row["loss"] is None else f", loss {row['loss']:.4f}"
        print(f"{row['name']}: {row['status']}, step {row['steps_taken'] or 0} of {row['steps']}{loss}")
    _report(sweep, rows, as_json=args.json)
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    general = argparse.ArgumentParser(add_help=False)
    general.add_argument("--config", type=pathlib.Path, required=True, metavar="FILE.py", help="sweep file")
    general.add_argument(
        "--workdir", type=pathlib.Path, required=True, help="folder of the runs and of the table"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_expand = commands.add_parser("expand", parents=[general], help="name the cells and their commands")
    to_expand.add_argument(
        "--launch",
        metavar="FLAGS",
        help="write a launcher's file per cell instead: flags of `python -m launch render` in one string, "
        "such as --launch='--backend=slurm --topology=h100:8'",
    )
    to_expand.add_argument(
        "--files", type=pathlib.Path, metavar="DIR", help="where to write them (default WORKDIR/launch)"
    )
    to_run = commands.add_parser("run", parents=[general], help="run the cells, or go on with them")
    to_run.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (default 1)")
    to_run.add_argument("--retry", action="store_true", help="run failed cells again")
    to_ask = commands.add_parser("status", parents=[general], help="say where each cell stands")
    for command in (to_run, to_ask):
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _written(sweep: Sweep) -> None:
    table.write(sweep)


def _say(line: str) -> None:
    print(line, flush=True)


def _report(sweep: Sweep, rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """How many cells ended well, and why others did not."""
    counts = collections.Counter(row["status"] for row in rows)
    print(f"{counts[local.DONE]} of {len(rows)} cells done: {sweep.workdir}")
    for row in rows:
        if row["message"]:
            print(f"{row['name']}: {row['status']}: {row['message']}")
    if as_json:
        print(json.dumps({"cells": len(rows), **counts, "results": str(sweep.workdir / "results.parquet")}))


if __name__ == "__main__":
    main_guard(main)
