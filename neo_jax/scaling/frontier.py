"""The compute-optimal frontier: N ~ C^a, D ~ C^b, L ~ C^c, D ~ N^d (Shukor et al. 2025, section 3 and
appendix).

a, b and d by regression on the bottoms of the iso-FLOP valleys, and in closed form from alpha and beta; c by
regression of log L over log C on the lower convex hull of the runs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from neo_jax.scaling import isoflop, parametric
from neo_jax.scaling.isoflop import PowerLaw
from neo_jax.scaling.law import Array
from neo_jax.scaling.points import Points

EXPONENTS = ("a", "b", "c", "d")
MIN_ON_HULL = 2


@dataclasses.dataclass(frozen=True)
class Exponent:
    """One exponent with its 90 % interval; NaN where the runs do not say."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Frontier:
    """
    Attributes:
        measured: exponent -> from valleys (a, b, d) and from the hull (c).
        closed_form: a, b and d from the parametric law.
        laws: the power laws behind `measured`, where there are any.
        hull: indices of the runs on the hull, by rising C.
    """

    measured: Mapping[str, Exponent]
    closed_form: Mapping[str, Exponent]
    laws: Mapping[str, PowerLaw]
    hull: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "measured": {name: one.as_dict() for name, one in self.measured.items()},
            "closed_form": {name: one.as_dict() for name, one in self.closed_form.items()},
            "laws": {name: law.as_dict() for name, law in self.laws.items()},
        }


def fit(points: Points, fitted: parametric.Fit, *, draws: int, seed: int, min_flops: float = 0.0) -> Frontier:
    """
    Args:
        fitted: the parametric law with its bootstrap draws.
        draws, seed: of the bootstrap of `measured`.
        min_flops: runs of fewer FLOPs take no part in c (Shukor et al. leave out C <= 3e19).
    """
    hull = lower_hull(points, min_flops)
    laws = {name: law for name, law in isoflop.power_laws(isoflop.valleys(points)).items() if name != "c"}
    on_hull = points.take(hull)
    if len(hull) >= MIN_ON_HULL:
        laws["c"] = PowerLaw.through(on_hull.c, on_hull.loss)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in EXPONENTS}
    for _ in range(draws):
        for name, law in isoflop.draw(points, rng).items():
            if name != "c":
                drawn[name].append(law.exponent)
        again = points.take(rng.integers(len(points), size=len(points)))
        again = again.take(lower_hull(again, min_flops))
        if len(again) >= MIN_ON_HULL:
            drawn["c"].append(PowerLaw.through(again.c, again.loss).exponent)
    measured = {
        name: Exponent(
            laws[name].exponent if name in laws else math.nan, *parametric.interval(np.array(drawn[name]))
        )
        for name in EXPONENTS
    }
    closed = {
        name: Exponent(
            fitted.law.exponents[name],
            *parametric.interval(np.array([law.exponents[name] for law in fitted.draws])),
        )
        for name in ("a", "b", "d")
    }
    return Frontier(measured, closed, laws, tuple(hull))


def lower_hull(points: Points, min_flops: float = 0.0) -> list[int]:
    """Indices of the runs on the lower convex hull of log L over log C, as far as it falls."""
    x, y = np.log(points.c), np.log(points.loss)
    hull: list[int] = []
    for i in np.lexsort((y, x)):
        if points.c[i] <= min_flops or (hull and x[i] == x[hull[-1]]):
            continue
        while len(hull) > 1 and _turn(x, y, hull[-2], hull[-1], i) <= 0:
            hull.pop()
        hull.append(int(i))
    lowest = int(np.argmin(y[hull])) if hull else -1
    return hull[: lowest + 1]


def _turn(x: Array, y: Array, i: int, j: int, k: int) -> float:
    """Positive if the way i, j, k turns left."""
    return float((x[j] - x[i]) * (y[k] - y[i]) - (y[j] - y[i]) * (x[k] - x[i]))
