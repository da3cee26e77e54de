"""Builds a data folder.

    python -m data_pipelines.build --recipe=quickstart --output=data/quickstart
    python -m data_pipelines.build --recipe=web --input=cc12m=webdataset:/data/cc12m --output=data/cc12m
    python -m data_pipelines.build --recipe=my_recipe.py --input=... --output=gs://bucket/out \\
        --runner=DataflowRunner --project=... [flags of Apache Beam]

A build that was stopped goes on with the same command.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.build import RECIPES, build, inputs, recipe_parameters, recipes, run
from data_pipelines.build.outputs import Rows
from data_pipelines.errors import DataError
from data_pipelines.forms import FORMS

BEAM_RUNNERS = "DirectRunner, FlinkRunner, SparkRunner, DataflowRunner, ..."


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, flags = parser.parse_known_args(argv)
    on_beam = args.runner != "local"
    if flags and not on_beam:
        parser.error(f"unrecognized arguments: {' '.join(flags)} (flags of Beam need --runner=beam)")
    try:
        if args.recipe in RECIPES:
            if args.input or on_beam:
                parser.error(f"recipe {args.recipe} brings its own input and runs locally")
            locales = args.locales.split(",")
            build(
                Path(args.output), recipe_parameters(args.recipe, locales, args.image_size, args.vocab_size)
            )
            return 0
        if not args.input:
            parser.error(f"recipe {args.recipe} needs --input=[NAME=]KIND:PATH")
        changes: dict[str, Any] = {
            name: getattr(args, name)
            for name in ("num_shards", "holdout", "tokenizer", "seed")
            if getattr(args, name) is not None
        }
        if changes.get("tokenizer", "").isdigit():
            changes["tokenizer"] = int(changes["tokenizer"])
        if args.pack:
            changes["output"] = Rows.from_config_file(args.pack, args.stage)
        if on_beam and args.runner != "beam":
            flags = [f"--runner={args.runner}", *flags]
        run.run(
            dataclasses.replace(recipes.get(args.recipe), **changes),
            [inputs.parse(spec, args.form, args.split) for spec in args.input],
            args.output,
            runner="beam" if on_beam else "local",
            workers=args.workers,
            flags=flags,
        )
    except DataError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    description, *_ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.build",
        description=description,
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", required=True, help=f"{', '.join([*RECIPES, *recipes.RECIPES])} or FILE.py"
    )
    parser.add_argument("--output", required=True, help="folder to create; with Beam also a URL")
    general = parser.add_argument_group("recipes that read an input")
    general.add_argument(
        "--input", action="append", metavar="[NAME=]KIND:PATH", help="a source; give it again for another"
    )
    general.add_argument(
        "--form", default="caption", choices=sorted(FORMS), help="how fields become documents"
    )
    general.add_argument("--split", default="train", help="of inputs that have splits (default: train)")
    general.add_argument(
        "--num_shards",
        type=_at_least_one,
        help="output shards per split and source (default: the recipe's, or one per 512 MB of input); "
        "a worker sorts a shard in memory",
    )
    general.add_argument("--holdout", type=float, help='share of documents for the split "val"')
    general.add_argument("--tokenizer", help="tokenizer.json, or the vocabulary size of one to train")
    general.add_argument(
        "--pack", metavar="CONFIG.py[:ARG]", help="pack rows now, for a stage of this config"
    )
    general.add_argument("--stage", help="of --pack (default: the config's last stage)")
    general.add_argument("--seed", type=int, help="of the shuffle")
    general.add_argument(
        "--runner", default="local", help=f"local (default), beam, or a runner of Beam: {BEAM_RUNNERS}"
    )
    general.add_argument(
        "--workers", type=_at_least_one, help="processes of the local runner (default: one per core)"
    )
    quickstart = parser.add_argument_group("recipe quickstart")
    quickstart.add_argument(
        "--locales", default="en", help="caption languages, comma-separated (default: en)"
    )
    quickstart.add_argument("--image_size", default=128, type=int, help="pixels per side (default: 128)")
    quickstart.add_argument("--vocab_size", default=2048, type=int, help="size of the BPE (default: 2048)")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
