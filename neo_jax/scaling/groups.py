"""A law for every source of the data, and for every arm of a sweep: mixtures, architectures, resolutions.

Sources share their runs and differ in the column of the loss; arms are different runs. D counts all tokens in
both.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from neo_jax.errors import UserError
from neo_jax.scaling import parametric
from neo_jax.scaling.points import Points, Row, number, select

SOURCE_PREFIX = "loss/"  # columns of a sweep's table: held-out loss by source


def source_columns(rows: Sequence[Row]) -> list[str]:
    """Columns of the loss by source, where more than one source has a value."""
    found = sorted({name for row in rows for name in row if name.startswith(SOURCE_PREFIX)})
    return found if len(found) > 1 else []


def by_source(
    points: Points, *, delta: float, draws: int, seed: int
) -> tuple[dict[str, parametric.Fit], dict[str, str]]:
    """(source -> its law, source -> why it has none), from the runs of `points`."""
    fits, missing = {}, {}
    for column in source_columns(points.rows):
        source = column.removeprefix(SOURCE_PREFIX)
        losses = np.array([number(row.get(column)) for row in points.rows])
        usable = np.isfinite(losses) & (losses > 0)
        if usable.all():
            its = Points(points.n, points.d, points.c, losses, points.rows)
            fits[source] = parametric.fit(its, delta=delta, draws=draws, seed=seed)
        else:
            missing[source] = f"{(~usable).sum()} of {len(points)} runs have no loss of this source"
    return fits, missing


def arms(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    """The rows by what a column says, in order of appearance; one group "" where no row has it."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.get(column) or ""), []).append(row)
    return found


def by_arm(
    groups: Mapping[str, Sequence[Row]],
    columns: Mapping[str, str | None],
    *,
    delta: float,
    draws: int,
    seed: int,
) -> tuple[dict[str, tuple[Points, parametric.Fit]], dict[str, str]]:
    """(arm -> its runs and law, arm -> why it has none)."""
    fits, missing = {}, {}
    for arm, rows in groups.items():
        try:
            points = select(rows, **columns)  # type: ignore[arg-type]
        except UserError as error:
            missing[arm] = str(error)
        else:
            fits[arm] = points, parametric.fit(points, delta=delta, draws=draws, seed=seed)
    return fits, missing
