"""Hugging Face folders from checkpoints.

python -m neo_jax.convert export --workdir=runs/quickstart --out=runs/quickstart/hf [--step=N]
"""

import argparse
import pathlib
from collections.abc import Sequence

import jax

from neo_jax import restore, workdir as workdir_lib
from neo_jax.convert.export import export
from neo_jax.errors import main_guard


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.convert", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("export", help="write a checkpoint as a NEO folder of Hugging Face's layout")
    to_hf.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the run")
    to_hf.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder to write; replaced if it exists"
    )
    to_hf.add_argument("--step", type=int, help="which checkpoint; the newest without it")
    args = parser.parse_args(argv)

    config = workdir_lib.load_config(args.workdir)
    trained = restore.load(args.workdir, config, args.step)
    stage = trained.stage.config
    export(
        args.out,
        "neo",
        config.model,
        jax.device_get(trained.params),
        pathlib.Path(config.data.path) / "tokenizer.json",
        stage.min_pixels,
        stage.max_pixels,
    )
    print(f"wrote step {trained.step} to {args.out}")


if __name__ == "__main__":
    main_guard(main)
