"""Checkpoints from and to folders in Hugging Face's layout.

    python -m neo_jax.convert import --hf=DIR --out=WORKDIR
    python -m neo_jax.convert import --hf=LLM_DIR --out=WORKDIR --config=configs/neo_2b.py
    python -m neo_jax.convert export --workdir=runs/quickstart --out=runs/quickstart/hf [--step=N]
    python -m neo_jax.convert verify --hf=DIR [--case=FILE]

`import` writes a workdir without a run: give it to neo_jax.generate, or train with --config.init=WORKDIR.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

from neo_jax import config as config_lib, restore, workdir as workdir_lib
from neo_jax.convert import import_, ours, verify
from neo_jax.convert.export import export
from neo_jax.errors import UserError, main_guard


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.convert", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("export", help="write a checkpoint as its family's Hugging Face folder")
    to_hf.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the run")
    to_hf.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder to write; replaced if it exists"
    )
    to_hf.add_argument("--step", type=int, help="which checkpoint; the newest without it")
    from_hf = commands.add_parser("import", help="read a Hugging Face folder into a workdir")
    from_hf.add_argument(
        "--hf", type=pathlib.Path, required=True, help="folder with config.json and safetensors"
    )
    from_hf.add_argument("--out", type=pathlib.Path, required=True, help="workdir to write; must not exist")
    from_hf.add_argument(
        "--zero_pre_buffer",
        action="store_true",
        help="with --config: new pre-buffer layers add nothing at first, so that text logits are the base's",
    )
    config_lib.add_flag(from_hf, required=False)
    check = commands.add_parser(
        "verify", help="compare a Hugging Face folder, run by us, with another run of it"
    )
    check.add_argument(
        "--hf", type=pathlib.Path, required=True, help="folder with config.json and safetensors"
    )
    check.add_argument(
        "--case",
        type=pathlib.Path,
        help="recorded case to compare with; without it the folder's own PyTorch code is run",
    )
    check.add_argument(
        "--atol", type=float, default=1e-4, help="largest difference of a logit (default: 1e-4)"
    )
    check.add_argument("--json", action="store_true", help="print nothing but the numbers")
    args = config_lib.parse(parser, argv)
    {"import": import_hf, "export": export_hf, "verify": verify_hf}[args.command](args)


def import_hf(args: argparse.Namespace) -> None:
    native = config_lib.load(args.config, args.overrides) if args.config else None
    if native is None and args.overrides:
        raise UserError(
            "--config.FIELD=VALUE: needs --config=FILE.py, the native model that starts from this one"
        )
    source = import_.run(args.hf, args.out, native, args.zero_pre_buffer)
    if source.note:
        print(f"note: {source.note}")
    print(f"wrote {source.family_name} to {args.out}")


def verify_hf(args: argparse.Namespace) -> None:
    numbers = verify.run(args.hf, args.case)
    if not args.json:
        for name, error in verify.layer_errors(numbers):
            print(f"{name}: {error:.3g}")
        print(f"wrote {verify.CARD}")
    print(json.dumps(numbers))
    if not numbers["max_abs_error"] <= args.atol:
        raise UserError(
            f"{args.hf}: a logit differs by {numbers['max_abs_error']:.3g}, more than {args.atol:g}"
        )


def export_hf(args: argparse.Namespace) -> None:
    config = workdir_lib.load_config(args.workdir)
    checkpoint = restore.checkpoint_folder(args.workdir, args.step)
    tokenizer = restore.tokenizer_of(args.workdir, config, checkpoint, restore.load_record(checkpoint))
    stage = restore.last_stage(config, int(checkpoint.name)).config
    export(args.out, config, stage, ours.loader(checkpoint), tokenizer)
    print(f"wrote step {checkpoint.name} to {args.out}")


if __name__ == "__main__":
    main_guard(main)
