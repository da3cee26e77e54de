"""Compiles a config's train step for a TPU topology, on this CPU: memory, FLOPs, transfers, step time, MFU.

    python -m neo_jax.preflight --config=configs/neo_2b.py --topology=v5e:4x4 [--num_slices=2] [--out=FILE]
    python -m neo_jax.preflight --all [--out=FILE]

Needs the libtpu wheel (`pip install libtpu`) and minutes. On another number of devices than config.mesh says,
`tensor`, `context` and the rows of a device stay, and weights are split over the rest. Exit code 5: the step
does not fit; the last line says what would.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before JAX and libtpu are loaded: no device, so that others may compile at the same time, no question to a
# metadata server, no logs.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
# Any machine will do: programs do not depend on it, but libtpu complains on stderr if it finds none.
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

from ml_collections import FrozenConfigDict

from neo_jax import config as config_lib, hardware
from neo_jax.errors import UserError, main_guard
from neo_jax.hardware import Target
from neo_jax.preflight import report, search

EXIT_DOES_NOT_FIT = 5

# What --all compiles: (config, topology, slices).
SHIPPED = (
    ("configs/neo_2b.py", "v5e:4x4", 1),
    ("configs/neo_2b.py", "v6e:4x4", 1),
    ("configs/neo_9b.py", "v5p:4x4x4", 1),
    ("configs/neo_9b.py", "v6e:16x16", 1),
    ("configs/neo_9b.py", "v6e:16x16", 2),
    ("configs/neo_9b.py", "tpu7x:4x4x4", 1),
    ("configs/hovle_2b.py", "v5e:8x8", 1),
    ("configs/mono_internvl_2b.py", "v5e:8x8", 1),
    ("configs/neo_ov_2b.py", "v6e:8x16", 1),
    ("configs/eve_7b.py", "v5p:2x4x4", 1),
    ("configs/solo_7b.py", "v5p:2x2x2", 1),
    ("configs/breen_7b.py", "v5p:4x4x4", 1),
    ("configs/evev2_7b.py", "v5p:4x4x8", 1),
    ("configs/fuyu_8b.py", "v5p:2x2x4", 1),
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.preflight", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--topology", help="slice, such as v5p:4x4x4; v5e, v5p, v6e and tpu7x")
    parser.add_argument("--num_slices", type=int, default=1, help="slices joined by the data-centre network")
    parser.add_argument("--stage", help="stage of the config; by default its last")
    parser.add_argument(
        "--document_tokens",
        type=int,
        default=1024,
        help="length of the documents that rows are assumed to hold",
    )
    parser.add_argument(
        "--search", action="store_true", help="find the most rows per device that fit at once"
    )
    parser.add_argument("--all", action="store_true", help="a table of the shipped configs and topologies")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--out", type=Path, help="file to write the same JSON object to")
    args = config_lib.parse_args(parser, argv, required=False)
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f"--out={args.out}: name a file, in a folder that exists")
    if args.all:
        return _all(args)
    if args.config is None or args.topology is None:
        parser.error("needs --config and --topology, or --all")
    for name in ("num_slices", "document_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: must be positive, got {getattr(args, name)}")
    target = Target(hardware.parse(args.topology), args.num_slices)
    if target.slice.chip.platform != "tpu":
        raise UserError(f"--topology={args.topology}: only TPU programs can be compiled without the device")
    hardware.check_hosts(target.slice)
    config = config_lib.load(args.config, args.overrides)
    stage = _stage(config, args.stage)
    result = search.check(config, stage, target, args.document_tokens)
    print(report.text(result))
    code = 0 if result.fits else EXIT_DOES_NOT_FIT
    extra = {}
    if not result.fits:
        print(f"does not fit; {search.suggestion(result)}")
    elif args.search:
        extra["max_rows_per_device"] = search.most_rows(result)
        print(f"at most {extra['max_rows_per_device']} rows per device fit at once")
    _hand_over(report.as_json(result) | extra, args)
    return code


def _hand_over(found: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Prints and writes the JSON object, as the flags say."""
    if args.json:
        print(json.dumps(found))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


def _stage(config: FrozenConfigDict, name: str | None) -> str:
    if name is None:
        return config.stages[-1]
    if name not in config.stages:
        raise UserError(f"--stage={name}: the config has {', '.join(config.stages)}")
    return name


def _all(args: argparse.Namespace) -> int:
    """Compiles everything of SHIPPED that is there, one after the other; the exit code says if all fit."""
    results = []
    for path, topology, num_slices in SHIPPED:
        config = config_lib.load(str(Path(__file__).parents[2] / path))
        target = Target(hardware.parse(topology), num_slices)
        result = search.check(config, config.stages[-1], target)
        results.append((path, result))
        print(report.row(path, result), file=sys.stderr, flush=True)
    print(report.table(results))
    _hand_over({f"{path} on {r.target.name}": report.as_json(r) for path, r in results}, args)
    return 0 if all(result.fits for _, result in results) else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    main_guard(main)
