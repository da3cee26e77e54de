"""Changes of a config, combined by product, chain and zip into the named cells of a sweep.

widths = cells.axis("model.hidden_size", (64, 128), "w")
rates = cells.axis("stage.full.peak_lr", (1e-3, 3e-3), "lr")
cells.build(quickstart.get_config(), cells.product(widths, rates))     # w64-lr0.001, w64-lr0.003, ...
"""

import dataclasses
import importlib.util
import itertools
import pathlib
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from neo_jax import config as config_lib
from neo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Change:
    """Named values for fields of a config.

    Attributes:
        name: part of the cells' names.
        values: dotted field -> value.
        arm: which of the things that the sweep compares this is; "" where it compares none.
        budget: nominal training FLOPs, for cells that are to share a valley.
    """

    name: str
    values: Mapping[str, Any]
    arm: str = ""
    budget: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        config: resolved.
        trunk: name of the cell from whose checkpoint `branch_step` this one goes on; "" = starts by itself.
    """

    name: str
    config: FrozenConfigDict
    arm: str = ""
    budget: float | None = None
    trunk: str = ""
    branch_step: int = 0


def axis(field: str, values: Sequence[Any], label: str = "") -> list[Change]:
    """One change per value, named by label (the field's last part) and value."""
    label = label or field.rpartition(".")[2]
    return [Change(f"{label}{_written(value)}", {field: value}) for value in values]


def product(*grids: Sequence[Change]) -> list[Change]:
    """Every combination, the last grid changing fastest."""
    return [_merged(combination) for combination in itertools.product(*grids)]


def chain(*grids: Sequence[Change]) -> list[Change]:
    """One grid after the other."""
    return list(itertools.chain(*grids))


def zip_(*grids: Sequence[Change]) -> list[Change]:
    """The first of each, the second of each, ...

    Raises:
        UserError: they differ in length.
    """
    if len({len(grid) for grid in grids}) > 1:
        raise UserError(f"zip_: grids of different lengths: {', '.join(str(len(grid)) for grid in grids)}")
    return [_merged(combination) for combination in zip(*grids, strict=True)]


def build(base: ConfigDict, changes: Iterable[Change]) -> list[Cell]:
    """The cells of a base config and its changes.

    Raises:
        UserError: a change names no field of the config, or gives it a value it cannot have; names the cell.
    """
    built = []
    for change in changes:
        config = ConfigDict(base.to_dict())
        config.name = change.name
        try:
            for field, value in change.values.items():
                _set(config, field, value)
            resolved = config_lib.resolve(config)
        except UserError as error:
            raise UserError(f"cell {change.name}: {error}") from error
        built.append(Cell(change.name, resolved, change.arm, change.budget))
    return built


def check(sweep: object) -> list[Cell]:
    """The cells of a sweep file's `get_sweep()`.

    Raises:
        UserError: it is no list of cells, is empty, names two alike, or a trunk does not exist or come first.
    """
    if not isinstance(sweep, list) or not all(isinstance(cell, Cell) for cell in sweep):
        raise UserError("get_sweep() must return a list of cells, such as cells.build(base, changes)")
    if not sweep:
        raise UserError("get_sweep() returned no cell")
    earlier: set[str] = set()
    for cell in sweep:
        if not re.fullmatch(r"[\w.+-]+", cell.name):
            raise UserError(f"cell {cell.name!r}: a name is made of letters, digits, _, ., + and -")
        if cell.name in earlier:
            raise UserError(f"two cells are named {cell.name}")
        if cell.trunk and cell.trunk not in earlier:
            raise UserError(f"cell {cell.name}: its trunk {cell.trunk!r} is no earlier cell")
        earlier.add(cell.name)
    return sweep


def find(sweep: list[Cell], name: str) -> FrozenConfigDict:
    """One cell's config, for a sweep file's `get_config(name)`. Raises UserError if there is no such cell."""
    for cell in sweep:
        if cell.name == name:
            return cell.config
    names = ", ".join(cell.name for cell in sweep)
    raise UserError(f"no cell {name!r}; behind the file name, put one of {names}")


def load(file: pathlib.Path) -> list[Cell]:
    """The checked cells of a sweep file. Raises UserError for what is wrong with it."""
    if not file.is_file():
        raise UserError(f"--config={file}: no such file")
    spec = importlib.util.spec_from_file_location(f"sweep_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={file}: a sweep is a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        for name in ("get_sweep", "get_config"):
            if not callable(getattr(module, name, None)):
                raise UserError(f"has no function {name}()")
        return check(module.get_sweep())
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
        ]
        where = f"line {lines[-1]}: " if lines else ""
        raise UserError(f"{file}: {where}{type(error).__name__}: {error}") from error


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *sections, name = field.split(".")
    parent = config
    for section in sections:
        if section not in parent or not isinstance(parent[section], ConfigDict):
            raise UserError(f"{field}: no such field")
        parent = parent[section]
    if name not in parent:
        raise UserError(f"{field}: no such field")
    if isinstance(parent[name], ConfigDict):
        value = ConfigDict(value)
        del parent[name]
    with parent.ignore_type():  # `resolve` checks types, by the schema
        parent[name] = value


def _merged(changes: Sequence[Change]) -> Change:
    values: dict[str, Any] = {}
    for change in changes:
        for field, value in change.values.items():
            if field in values and values[field] != value:
                raise UserError(f"{change.name} and another change both set {field}")
            values[field] = value
    budgets = [change.budget for change in changes if change.budget is not None]
    return Change(
        "-".join(change.name for change in changes if change.name),
        values,
        "-".join(change.arm for change in changes if change.arm),
        budgets[-1] if budgets else None,
    )


def _written(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)
