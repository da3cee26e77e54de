"""Runs a sweep, or goes on with it: python -m neo_jax.sweep --sweep=FILE.py --out=DIR"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from neo_jax import config as config_lib
from neo_jax.errors import EXIT_OK, EXIT_USER_ERROR, UserError, main_guard
from neo_jax.sweep import cells, local, table
from neo_jax.sweep.local import Sweep


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.sweep", description=__doc__)
    parser.add_argument("--sweep", type=pathlib.Path, required=True, metavar="FILE.py", help="what to run")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of the runs and the table"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (default 1)")
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    parser.add_argument(
        "--list", action="store_true", help="only say which cells there are, and their commands"
    )
    parser.add_argument(
        "--launch",
        metavar="FLAGS",
        help="write a launcher's file per cell instead: flags of `python -m launch render` in one string, "
        "such as --launch='--backend=slurm --topology=h100:8'",
    )
    parser.add_argument(
        "--files", type=pathlib.Path, metavar="DIR", help="where to write them (default OUT/launch)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = config_lib.parse(parser, argv)
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: at least 1")
    sweep = Sweep(args.sweep, cells.load(args.sweep), args.out, args.overrides)
    if args.launch is not None:
        from neo_jax.sweep import launcher  # needs the launcher's packages

        print("\n".join(launcher.write(sweep, args.launch, args.files or args.out / "launch")))
        return EXIT_OK
    local.check(sweep)
    if args.list:
        for cell in sweep.cells:
            print(f"{cell.name}: {' '.join(sweep.command(cell))}")
        return EXIT_OK
    code = local.run(sweep, jobs=args.jobs, retry=args.retry, after_each=lambda: _written(sweep), say=_say)
    rows = table.write(sweep)
    print(_summary(rows, args.out))
    if args.json:
        counts = {
            status: sum(row["status"] == status for row in rows) for status in {row["status"] for row in rows}
        }
        print(json.dumps({"cells": len(rows), **counts, "results": str(args.out / "results.parquet")}))
    if code == EXIT_OK and any(row["status"] in (local.FAILED, local.BLOCKED) for row in rows):
        return EXIT_USER_ERROR
    return code


def _written(sweep: Sweep) -> None:
    table.write(sweep)


def _say(line: str) -> None:
    print(line, flush=True)


def _summary(rows: Sequence[dict[str, Any]], out: pathlib.Path) -> str:
    """How many cells ended well, and for each other what became of it."""
    lines = [
        f"{sum(row['status'] == local.DONE for row in rows)} of {len(rows)} cells done: {out}/results.parquet"
    ]
    for row in rows:
        if row["status"] != local.DONE:
            lines.append(
                f"{row['name']}: {row['status']}" + (f": {row['message']}" if row["message"] else "")
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main_guard(main)
