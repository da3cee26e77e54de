"""The table of runs that laws are fitted to: read, and reduced to the columns that a fit needs.

Rows that cannot be used (failed, diverged, unfinished, no finite loss) are kept aside with the reason, never
dropped silently.
"""

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neo_jax.errors import UserError
from neo_jax.scaling.law import FLOPS_PER_PARAMETER_AND_TOKEN, Array

MIN_POINTS = 6  # the law has five numbers
MIN_VALUES = 3  # different N and different D
RESULTS = ("results.parquet", "results.jsonl")  # what a sweep writes into its folder
N, D, C, LOSS = "n_non_embedding", "tokens", "flops", "loss"  # its columns
BUDGET = "budget"  # the column of an IsoFLOP sweep that says which runs are to be compared

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Points:
    """Runs as arrays of length R, in the order of the table."""

    n: Array  # parameters
    d: Array  # training tokens
    c: Array  # FLOPs
    loss: Array  # nats per token
    rows: tuple[Row, ...]  # everything the table says about them
    left_out: tuple[tuple[str, str], ...] = ()  # (name of the run, why)

    def __len__(self) -> int:
        return len(self.n)

    def take(self, which: Sequence[int] | Array) -> "Points":
        """Those runs, by index or mask."""
        index = np.arange(len(self))[np.asarray(which)]
        rows = tuple(self.rows[i] for i in index)
        return Points(self.n[index], self.d[index], self.c[index], self.loss[index], rows, self.left_out)

    @property
    def flops_per_nd(self) -> float:
        """C / (N D), the median over the runs: 6 for large dense models."""
        return float(np.median(self.c / (self.n * self.d)))


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a table: CSV, JSON lines, Parquet, or the folder of a sweep.

    Raises:
        UserError: there is no such table, or it is empty or damaged, or a budget is no number.
    """
    if path.is_dir():
        found = [path / name for name in RESULTS if (path / name).is_file()]
        if not found:
            raise UserError(
                f"--results={path}: holds no {' or '.join(RESULTS)}; have neo_jax.sweep run or status write "
                f"them, with --workdir={path}"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"--results={path}: no such file or folder")
    try:
        rows = _READERS[path.suffix](path)
    except KeyError:
        raise UserError(f"--results={path}: a table ends in {', '.join(_READERS)}") from None
    except (ValueError, OSError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"--results={path}: damaged: {str(error).splitlines()[0]}") from error
    if not rows:
        raise UserError(f"--results={path}: holds no run")
    for i, row in enumerate(rows, 1):
        if row.get(BUDGET) not in (None, "") and not _is_number(row[BUDGET]):
            raise UserError(
                f"--results={path}: row {i}, column {BUDGET}: {row[BUDGET]!r} is no number of FLOPs; correct "
                "it, or rename a column that says something else"
            )
    return rows


def _csv(path: pathlib.Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    for i, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {i}: {error.msg}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f'line {i}: a run is an object, such as {{"loss": 2.5}}')
    return rows


def _parquet(path: pathlib.Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


_READERS = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}


def select(
    rows: Sequence[Row],
    *,
    n: str = N,
    d: str | None = None,
    c: str | None = None,
    loss: str = LOSS,
    drop_highest: int = 0,
) -> Points:
    """The runs that a law can be fitted to.

    Args:
        rows: of `read`.
        n, d, c, loss: names of columns. Without `d`, D = C / 6N; without `c`, C = 6ND; without either, the
            columns
            of a sweep's table.
        drop_highest: so many runs of highest loss are left out as outliers.

    Raises:
        UserError: a column is missing, or too few runs are left to fit five numbers to.
    """
    if d is None and c is None:
        d, c = D, C if any(C in row for row in rows) else None
    for name in (n, d, c, loss):
        if name is not None and not any(name in row for row in rows):
            raise UserError(f"the results have no column {name!r}; they have {', '.join(sorted(rows[0]))}")
    kept, values, left_out = [], [], []
    for i, row in enumerate(rows):
        numbers = [number(row.get(name)) if name else math.nan for name in (n, d, c, loss)]
        if reason := _unusable(row, dict(zip((n, d, c, loss), numbers, strict=True))):
            left_out.append((_name(row, i), reason))
            continue
        kept.append((i, row))
        values.append(numbers)
    table = np.array(values).reshape(-1, 4)
    if d is None:
        table[:, 1] = table[:, 2] / (FLOPS_PER_PARAMETER_AND_TOKEN * table[:, 0])
    if c is None:
        table[:, 2] = FLOPS_PER_PARAMETER_AND_TOKEN * table[:, 0] * table[:, 1]
    highest = set(np.argsort(table[:, 3], kind="stable")[max(0, len(table) - drop_highest) :])
    left_out += [
        (_name(kept[i][1], kept[i][0]), f"among the {drop_highest} of highest loss") for i in sorted(highest)
    ]
    stay = [i for i in range(len(kept)) if i not in highest]
    columns = table[stay].T
    usable = tuple(kept[i][1] for i in stay)
    points = Points(columns[0], columns[1], columns[2], columns[3], usable, tuple(left_out))
    check(points, len(rows))
    return points


def check(points: Points, total: int) -> None:
    """Raises UserError where a law cannot be fitted."""
    reasons = sorted({reason for _, reason in points.left_out})
    why = f" ({'; '.join(reasons)})" if reasons else ""
    if not len(points):
        raise UserError(f"none of the {total} runs can be used{why}; nothing can be fitted")
    if len(points) < MIN_POINTS:
        raise UserError(
            f"only {len(points)} of {total} runs can be used{why}; a law of five numbers needs at least "
            f"{MIN_POINTS}"
        )
    for name, values in (("N", points.n), ("D", points.d)):
        different = len(np.unique(values))
        if different < MIN_VALUES:
            raise UserError(
                f"the runs have {different} different {name}; a law needs at least {MIN_VALUES}: widen "
                f"the sweep"
            )


def _unusable(row: Row, numbers: Mapping[str | None, float]) -> str:
    """Why a run cannot be used, or ""."""
    status = row.get("status", "done")
    if status != "done":
        return str(status)
    for name, value in numbers.items():
        if name is not None and not (math.isfinite(value) and value > 0):
            return f"{name} is {row.get(name)!r}"
    return ""


def _name(row: Row, index: int) -> str:
    return str(row.get("name", f"row {index + 1}"))


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def number(value: Any) -> float:
    """A cell as a number; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
