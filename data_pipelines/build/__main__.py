"""Builds a data folder: python -m data_pipelines.build --recipe=quickstart --output=DIR"""

import argparse
import sys
from pathlib import Path

from data_pipelines.build import RECIPES, build, recipe_parameters
from data_pipelines.errors import DataError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.build", description=__doc__)
    parser.add_argument("--recipe", required=True, choices=sorted(RECIPES))
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    parser.add_argument("--locales", default="en", help="caption languages, comma-separated (default: en)")
    parser.add_argument("--image_size", default=128, type=int, help="pixels per side (default: 128)")
    parser.add_argument("--vocab_size", default=2048, type=int, help="size of the BPE (default: 2048)")
    args = parser.parse_args()
    try:
        locales = args.locales.split(",")
        build(args.output, recipe_parameters(args.recipe, locales, args.image_size, args.vocab_size))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
