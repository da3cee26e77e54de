"""Everything that one fit says, put together; and the same as JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neo_jax.scaling import frontier as frontier_lib, groups, heldout, isoflop, mixtures, parametric
from neo_jax.scaling.frontier import Frontier
from neo_jax.scaling.heldout import Prediction
from neo_jax.scaling.isoflop import Valley
from neo_jax.scaling.law import NAMES, NOTHING, Law
from neo_jax.scaling.mixtures import Mixtures
from neo_jax.scaling.parametric import Fit, interval
from neo_jax.scaling.points import Points, Row, select
from neo_jax.scaling.presets import Advice

ADVICE_FACTORS = (1, 10, 100)  # times the largest budget that was trained
UNSURE = 0.5  # an interval wider than this share of its exponent
MAX_DRAWS_BY_GROUP = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a fit: see `parametric.fit`, `points.select` and `frontier.fit`."""

    columns: Mapping[str, Any]
    delta: float
    draws: int
    seed: int
    min_flops: float
    by: str


@dataclasses.dataclass(frozen=True)
class Results:
    points: Points
    fitted: Fit
    valleys: Sequence[Valley]
    frontier: Frontier
    prediction: Prediction | None
    advice: Sequence[tuple[Advice, bool]]  # and whether the budget lies inside what was trained
    sources: Mapping[str, Fit]
    no_source: Mapping[str, str]
    arms: Mapping[str, Fit]
    no_arm: Mapping[str, str]
    mixtures: Mixtures | None
    no_mixtures: str  # why, or ""
    warnings: Sequence[str]


def analyse(rows: Sequence[Row], settings: Settings) -> Results:
    """Fits everything to the rows of a table. With several arms the main law is that of the first that has
    one; where only the law over mixtures could be fitted, it is that of all runs together.

    Raises:
        UserError: too few runs can be used.
    """
    arms = groups.arms(rows, settings.by)
    draws = min(settings.draws, MAX_DRAWS_BY_GROUP)
    arm_fits: dict[str, Fit] = {}
    no_arm: dict[str, str] = {}
    main = list(rows)
    over_mixtures, no_mixtures = mixtures.over_mixtures(
        rows, settings.columns, delta=settings.delta, draws=draws, seed=settings.seed
    )
    if len(arms) > 1:
        found, no_arm = groups.by_arm(
            arms, settings.columns, delta=settings.delta, draws=draws, seed=settings.seed
        )
        arm_fits = {name: fit for name, (_, fit) in found.items()}
        if found or over_mixtures is None:
            main = arms[next(iter(found), next(iter(arms)))]
    points = select(main, **settings.columns)
    fitted = parametric.fit(points, delta=settings.delta, draws=settings.draws, seed=settings.seed)
    sources, no_source = groups.by_source(points, delta=settings.delta, draws=draws, seed=settings.seed)
    return Results(
        points=points,
        fitted=fitted,
        valleys=isoflop.valleys(points),
        frontier=frontier_lib.fit(
            points, fitted, draws=settings.draws, seed=settings.seed, min_flops=settings.min_flops
        ),
        prediction=heldout.predict_largest(points, delta=settings.delta),
        advice=_advice(points, fitted.law),
        sources=sources,
        no_source=no_source,
        arms=arm_fits,
        no_arm=no_arm,
        mixtures=over_mixtures,
        no_mixtures=no_mixtures,
        warnings=_warnings(points, fitted, pooled=len(arms) > 1 and not arm_fits)
        + (over_mixtures.warnings if over_mixtures else []),
    )


def _advice(points: Points, law: Law) -> list[tuple[Advice, bool]]:
    """For budgets trained, and beyond. C = k N D with the k of the runs: 6, but for small models."""
    low, high = float(points.c.min()), float(points.c.max())
    given = []
    for flops in sorted({*np.geomspace(low, high, 3), *(factor * high for factor in ADVICE_FACTORS)}):
        n, d = (float(value) for value in law.optimum(flops, points.flops_per_nd))
        if math.isfinite(n) and math.isfinite(d):
            given.append((Advice(float(flops), n, d, float(law.loss(n, d))), bool(flops <= high * 1.001)))
    return given


def _warnings(points: Points, fitted: Fit, pooled: bool) -> list[str]:
    """What a reader should know before believing the numbers."""
    said = ["No arm has enough runs for a law; this one is of all arms together."] if pooled else []
    for name in ("alpha", "beta"):
        value = getattr(fitted.law, name)
        low, high = interval([getattr(law, name) for law in fitted.draws])
        if fitted.draws and high - low > UNSURE * value:
            said.append(f"{name} is not well known: 90 % of the draws span {low:.3g} to {high:.3g}.")
        if value < NOTHING:
            said.append(f"{name} is 0: the runs show no such term, and the law has no optimum.")
    if fitted.law.E < NOTHING:
        said.append("E is 0: the runs do not reach far enough to show an irreducible loss.")
    k = points.flops_per_nd
    if not 5 < k < 7:
        said.append(
            f"C / (N D) is {k:.3g}, not 6: attention and the output head weigh much in models of this "
            f"size. Advice "
            f"uses {k:.3g}."
        )
    return said


def as_json(results: Results) -> dict[str, Any]:
    """E, A, B, alpha, beta as numbers, their `intervals` (90 %), and everything else. NaN becomes null."""
    points, fitted = results.points, results.fitted
    return _finite(
        fitted.law.as_dict()
        | {
            "intervals": {
                name: list(interval([getattr(law, name) for law in fitted.draws])) for name in NAMES
            },
            "bootstrap_draws": len(fitted.draws),
            "objective": fitted.value,
            "runs": len(points),
            "left_out": [{"name": name, "reason": reason} for name, reason in points.left_out],
            "flops_per_nd": points.flops_per_nd,
            "mean_abs_residual": float(np.abs(fitted.residuals).mean()),
            "isoflop": [valley.as_dict() for valley in results.valleys],
            "frontier": results.frontier.as_dict(),
            "held_out": results.prediction.as_dict() if results.prediction else None,
            "advice": [dataclasses.asdict(advice) | {"inside": inside} for advice, inside in results.advice],
            "sources": {name: _group(fit) for name, fit in results.sources.items()},
            "arms": {name: _group(fit) for name, fit in results.arms.items()},
            "mixtures": results.mixtures.as_dict() if results.mixtures else None,
            "not_fitted": {**results.no_source, **results.no_arm}
            | ({"mixtures": results.no_mixtures} if results.no_mixtures else {}),
            "warnings": list(results.warnings),
        }
    )


def _group(fit: Fit) -> dict[str, Any]:
    intervals = {name: list(interval([getattr(law, name) for law in fit.draws])) for name in NAMES}
    return fit.law.as_dict() | {"intervals": intervals, **fit.law.exponents}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
