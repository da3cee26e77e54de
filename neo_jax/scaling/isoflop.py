"""Approach 2: at every budget the loss over N has a valley; its bottoms say how N and D grow with C.

Hoffmann et al. 2022, section 3.2: a parabola of the loss over log N per budget, then power laws through the
bottoms.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neo_jax.scaling.law import Array
from neo_jax.scaling.points import BUDGET, Points

SAME_BUDGET = 1.1  # without a column `budget`: neighbours in C whose ratio is below this are of one budget
MIN_IN_VALLEY = 3  # different N: a parabola has three numbers
MIN_VALLEYS = 2


@dataclasses.dataclass(frozen=True)
class Valley:
    """One budget: C (geometric mean of its runs'), the bottom of its parabola, and the parabola.

    Attributes:
        coefficients: of log N - center, highest power first.
        inside: the bottom lies between the smallest and the largest N that were trained. One that does not
            is an extrapolation and takes no part in the power laws.
    """

    flops: float
    n: float
    d: float
    loss: float
    inside: bool
    coefficients: tuple[float, float, float]
    center: float
    runs: Points

    def parabola(self, n: Array) -> Array:
        return np.polyval(self.coefficients, np.log(n) - self.center)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("flops", "n", "d", "loss", "inside")} | {
            "runs": len(self.runs)
        }


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = factor x^exponent."""

    factor: float
    exponent: float

    def __call__(self, x: Array) -> Array:
        return self.factor * np.asarray(x, float) ** self.exponent

    @classmethod
    def through(cls, x: Sequence[float] | Array, y: Sequence[float] | Array) -> "PowerLaw":
        """By least squares of the logarithms."""
        exponent, constant = np.polyfit(np.log(x), np.log(y), 1)
        with np.errstate(over="ignore"):  # of a slope that means nothing
            return cls(float(np.exp(constant)), float(exponent))

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def budgets(points: Points) -> list[Points]:
    """The runs by budget, rising: by the column `budget` of a sweep's table, else by C."""
    if points.rows and points.rows[0].get(BUDGET) not in (None, ""):
        keys = np.array([float(row.get(BUDGET) or "nan") for row in points.rows])
        return [points.take(keys == key) for key in np.unique(keys[np.isfinite(keys)])]
    order = np.argsort(points.c, kind="stable")
    ends: np.ndarray = np.flatnonzero(np.diff(np.log(points.c[order])) > np.log(SAME_BUDGET)) + 1
    return [points.take(part) for part in np.split(order, ends)]


def valleys(points: Points) -> list[Valley]:
    """The valley of every budget with enough runs and an upward parabola."""
    found = [_valley(runs) for runs in budgets(points) if len(np.unique(runs.n)) >= MIN_IN_VALLEY]
    return [valley for valley in found if valley is not None]


def _valley(runs: Points) -> Valley | None:
    x, center = np.log(runs.n), float(np.log(runs.n).mean())
    second, first, constant = np.polyfit(x - center, runs.loss, 2)
    if not second > 0:
        return None
    bottom = -first / (2 * second)
    # D at the bottom: along the budget log D is nearly a line over log N, of slope -1 where C = 6ND.
    with np.errstate(over="ignore"):  # a flat parabola has its bottom anywhere
        d, n = np.exp(np.polyval(np.polyfit(x - center, np.log(runs.d), 1), bottom)), np.exp(bottom + center)
    return Valley(
        flops=float(np.exp(np.log(runs.c).mean())),
        n=float(n),
        d=float(d),
        loss=float(constant - first**2 / (4 * second)),
        inside=bool(x.min() <= bottom + center <= x.max()),
        coefficients=(float(second), float(first), float(constant)),
        center=center,
        runs=runs,
    )


def power_laws(found: Sequence[Valley]) -> Mapping[str, PowerLaw]:
    """N, D and L of the bottoms against C, and D against N; {} with fewer than two inside their runs."""
    inside = [valley for valley in found if valley.inside]
    if len(inside) < MIN_VALLEYS:
        return {}
    c, n, d, loss = np.array([(v.flops, v.n, v.d, v.loss) for v in inside]).T
    return {
        "a": PowerLaw.through(c, n),
        "b": PowerLaw.through(c, d),
        "c": PowerLaw.through(c, loss),
        "d": PowerLaw.through(n, d),
    }


def draw(points: Points, rng: np.random.Generator) -> Mapping[str, PowerLaw]:
    """The power laws of the runs drawn again with replacement, each budget for itself."""
    drawn = []
    for runs in budgets(points):
        if len(np.unique(runs.n)) >= MIN_IN_VALLEY:
            again = runs.take(rng.integers(len(runs), size=len(runs)))
            if len(np.unique(again.n)) >= MIN_IN_VALLEY:
                drawn.append(_valley(again))
    return power_laws([valley for valley in drawn if valley is not None])
