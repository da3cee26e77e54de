"""How well a law predicts runs that it has not seen: the largest ones, as anybody who extrapolates would
want.
"""

import dataclasses
from typing import Any

import numpy as np

from neo_jax.errors import UserError
from neo_jax.scaling import parametric
from neo_jax.scaling.law import Array
from neo_jax.scaling.points import Points, check

SHARE = 0.2  # of the runs, those of most FLOPs


@dataclasses.dataclass(frozen=True)
class Prediction:
    """
    Attributes:
        runs: what was held out, by rising C.
        predicted: their losses by the law of all other runs.
        mean_error: mean |predicted / measured - 1|.
        largest_error: the largest.
        r2: share of the variance of the measured losses that is explained; NaN for a single run.
    """

    runs: Points
    predicted: Array
    num_fitted: int
    mean_error: float
    largest_error: float
    r2: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "held_out": len(self.runs),
            "fitted": self.num_fitted,
            "mean_error": self.mean_error,
            "largest_error": self.largest_error,
            "r2": self.r2,
        }


def predict_largest(points: Points, *, delta: float, share: float = SHARE) -> Prediction | None:
    """Fits all but the runs of most FLOPs and predicts those; None where too few would be left."""
    order = np.argsort(points.c, kind="stable")
    count = max(1, round(share * len(points)))
    least = points.c[order[len(points) - count]]
    # Runs of one budget differ by a little: none of the budget that is held out may be fitted.
    held = points.c >= least / 1.05
    fitted = points.take(~held)
    try:
        check(fitted, len(fitted))
    except UserError:
        return None
    runs = points.take(np.flatnonzero(held)[np.argsort(points.c[held], kind="stable")])
    predicted = parametric.fit(fitted, delta=delta).law.loss(runs.n, runs.d)
    errors = np.abs(predicted / runs.loss - 1)
    spread = float(((runs.loss - runs.loss.mean()) ** 2).sum())
    r2 = 1 - float(((predicted - runs.loss) ** 2).sum()) / spread if spread > 0 else float("nan")
    return Prediction(runs, predicted, len(fitted), float(errors.mean()), float(errors.max()), r2)
