"""Building a data folder: shards, tokenizer and the manifest that describes and guards them."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.build import quickstart, shards
from data_pipelines.build.manifest import FORMAT, MANIFEST, json_hash, missing, read_manifest, to_text
from data_pipelines.errors import DataError

RECIPES = {"quickstart": quickstart}

__all__ = ["MANIFEST", "RECIPES", "build", "ensure", "json_hash", "read_manifest", "recipe_parameters"]


def ensure(data_config: Any) -> dict[str, Any]:
    """Returns the manifest of `data_config.path`, building the folder first if it is missing.

    Args:
        data_config: the `data` part of a config.

    Raises:
        DataError: if the folder was built from another recipe or other parameters, a file is damaged (its
            name is in the message), or building fails.
    """
    folder = Path(data_config.path)
    recipe = data_config.recipe
    params = recipe_parameters(recipe, data_config.locales, data_config.image_size, data_config.vocab_size)
    if not (folder / MANIFEST).exists():
        if not params:
            raise DataError(f"config.data.path: {missing(folder)}, and config.data.recipe names no recipe")
        build(folder, params)
    manifest = read_manifest(folder)
    if params and manifest["recipe_hash"] != json_hash(params):
        raise DataError(
            f"{folder} was built with other parameters ({_difference(manifest['parameters'], params)}); "
            "choose another config.data.path, or delete the folder to build it again"
        )
    shards.check(folder, manifest["shards"])
    shards.check(folder, [manifest["tokenizer"]], contents=True)
    return manifest


def recipe_parameters(
    recipe: str, locales: Sequence[str], image_size: int, vocab_size: int
) -> dict[str, Any]:
    """Returns what a recipe's bytes depend on; empty for recipe "". Raises DataError if unknown."""
    if not recipe:
        return {}
    if recipe not in RECIPES:
        raise DataError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
    return RECIPES[recipe].parameters(locales=tuple(locales), image_size=image_size, vocab_size=vocab_size)


def build(folder: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Builds `folder` from scratch and returns its manifest. It appears whole or not at all."""
    start = time.monotonic()
    folder = folder.absolute()
    print(f"building {folder} with recipe {params['recipe']}", file=sys.stderr)
    temporary = None
    try:
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder}: exists and is not empty; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        manifest = {
            "format": FORMAT,
            "recipe_hash": json_hash(params),
            "parameters": params,
        } | RECIPES[params["recipe"]].build(temporary, params)
        manifest["data_hash"] = json_hash([manifest["shards"], manifest["tokenizer"]])
        (temporary / MANIFEST).write_text(to_text(manifest))
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as error:
        if (folder / MANIFEST).exists():
            return read_manifest(folder)  # another process was faster
        raise DataError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    counts = {split: sum(n.values()) for split, n in manifest["counts"].items()}
    summary = ", ".join(f"{split} {n}" for split, n in counts.items())
    print(f"built {folder} in {time.monotonic() - start:.0f} s: {summary}", file=sys.stderr)
    return manifest


def _difference(built: dict[str, Any], wanted: dict[str, Any]) -> str:
    changed = [key for key in sorted(built.keys() | wanted.keys()) if built.get(key) != wanted.get(key)]
    return ", ".join(f"{key}: built {built.get(key)!r}, wanted {wanted.get(key)!r}" for key in changed)
