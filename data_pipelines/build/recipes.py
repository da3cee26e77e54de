"""The named recipes; `--recipe=FILE.py` reads one from a file that defines `get_recipe()`.

from data_pipelines.build.recipe import Recipe

def get_recipe():
    return Recipe("mine", stages=(...), dedup=(...))
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from data_pipelines.build import dedup, filters
from data_pipelines.build.recipe import Recipe
from data_pipelines.errors import DataError, running


def keep() -> Recipe:
    """Everything that can be used at all: for data that is clean already."""
    return Recipe("keep", stages=(filters.NotEmpty(), filters.ImageSize()))


def web() -> Recipe:
    """Image-text pairs from the web: the filters of ALIGN and LAION, then duplicates by image and by text."""
    return Recipe(
        "web",
        stages=(
            filters.NotEmpty(),
            filters.TextLength(min_chars=5, max_chars=4_000, max_words=1_000),
            filters.Repetition(),
            filters.Language(("en",)),
            filters.ImageSize(min_side=64, max_aspect=3.0, min_bytes=1_000),
            filters.Decodable(),
        ),
        dedup=(dedup.ExactImage(), dedup.SimilarImage(), dedup.ExactText(), dedup.SimilarText()),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"keep": keep, "web": web}


def get(name: str) -> Recipe:
    """Returns a named recipe, or that of a file. Raises DataError if there is none."""
    if name in RECIPES:
        return RECIPES[name]()
    if not name.endswith(".py"):
        raise DataError(
            f"unknown recipe {name!r}; there are quickstart, {', '.join(RECIPES)} and files FILE.py"
        )
    if not Path(name).is_file():
        raise DataError(f"{name}: no such file")
    with running(name):
        made = getattr(_module(name), "get_recipe", lambda: None)()
    if not isinstance(made, Recipe):
        raise DataError(
            f"{name}: must define get_recipe(), which returns a data_pipelines.build.recipe.Recipe"
        )
    return made


_PREFIX = "recipe_file_"


def _module(file: str) -> ModuleType:
    """Runs a recipe file as a module that pickled stages and rules of the file can name."""
    name = _PREFIX + Path(file).stem
    spec = importlib.util.spec_from_file_location(name, Path(file).resolve())
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def modules() -> list[ModuleType]:
    """The recipe files of this process. Another process has to have them before it unpickles their stages."""
    return [module for name, module in sys.modules.items() if name.startswith(_PREFIX)]


def load(files: Sequence[str]) -> None:
    """Runs recipe files: what a process of a pool starts with."""
    for file in files:
        _module(file)
