"""Approach 3: the law that fits all runs at once, and how sure its numbers are.

    minimise  sum_i Huber_delta( LSE(a - alpha log N_i, b - beta log D_i, e) - log L_i )

with A, B, E = exp(a, b, e), by L-BFGS from the grid of starts of Hoffmann et al. 2022 (appendix D.2, equation
10), delta = 1e-3. All starts of the grid are evaluated at once and the best are descended from; log N and log
D are taken from their means, which makes a and alpha (b and beta) nearly independent. The minimum is found to
nine digits. Intervals: the runs are drawn again with replacement, as often as asked, and each draw is
fitted from the first fit.

Besiroglu et al. 2024 ("Chinchilla Scaling: A replication attempt") measure the residual in units of a fitted
scale of about 1e-2 before the Huber loss with delta = 1e-3; delta = 1e-5 says the same here, and gives their
numbers.
"""

import dataclasses
import itertools
from typing import Self

import numpy as np
from scipy import optimize
from threadpoolctl import threadpool_limits

from neo_jax.scaling.law import Array, Law
from neo_jax.scaling.points import Points

DELTA = 1e-3
NUM_STARTS = 40  # of the grid, descended from
GRID = tuple(
    itertools.product(
        (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),  # a
        (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),  # b
        (-1.0, -0.5, 0.0, 0.5, 1.0),  # e
        (0.0, 0.5, 1.0, 1.5, 2.0),  # alpha
        (0.0, 0.5, 1.0, 1.5, 2.0),  # beta
    )
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, over theta = (a at the mean of log N, b at the mean of log D, e, alpha, beta)."""

    log_n: Array  # [R], from their mean
    log_d: Array
    log_loss: Array
    mean_n: float
    mean_d: float
    delta: float

    @classmethod
    def of(cls, points: Points, delta: float) -> "Objective":
        log_n, log_d = np.log(points.n), np.log(points.d)
        mean_n, mean_d = float(log_n.mean()), float(log_d.mean())
        return cls(log_n - mean_n, log_d - mean_d, np.log(points.loss), mean_n, mean_d, delta)

    def take(self, rows: np.ndarray) -> Self:
        """The same for a draw of the runs; theta keeps its meaning."""
        log_n, log_d, log_loss = self.log_n[rows], self.log_d[rows], self.log_loss[rows]
        return dataclasses.replace(self, log_n=log_n, log_d=log_d, log_loss=log_loss)

    def residuals(self, theta: Array) -> Array:
        """log of the law - log L: theta [..., 5] -> [..., R]."""
        terms = self._terms(theta)
        top = terms.max(axis=0)
        return top + np.log(np.exp(terms - top).sum(axis=0)) - self.log_loss

    def values(self, theta: Array) -> Array:
        """Mean Huber loss in units of delta^2: theta [..., 5] -> [...]."""
        r = self.residuals(theta)
        clipped = np.clip(r, -self.delta, self.delta)
        return (clipped * (r - clipped / 2)).mean(axis=-1) / self.delta**2

    def __call__(self, theta: Array) -> tuple[float, Array]:
        """(value, gradient [5]) at one theta."""
        terms = self._terms(theta)
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        r = top + np.log(total) - self.log_loss
        clipped = np.clip(r, -self.delta, self.delta)
        scale = 1 / (self.delta**2 * len(r))
        gradient = self._gradient(theta, shares * (clipped / total * scale))
        return float((clipped * (r - clipped / 2)).sum() * scale), gradient

    def _gradient(self, theta: Array, by_term: Array) -> Array:
        """From derivatives by the terms, [terms, R], to those by theta."""
        by_n, by_d, by_e = by_term
        return np.array([by_n.sum(), by_d.sum(), by_e.sum(), -(by_n @ self.log_n), -(by_d @ self.log_d)])

    def _terms(self, theta: Array) -> Array:
        """The exponents of the three terms: [3, ..., R]."""
        a, b, e, alpha, beta = np.moveaxis(np.asarray(theta)[..., None], -2, 0)
        by_n, by_d = a - alpha * self.log_n, b - beta * self.log_d
        return np.stack([by_n, by_d, np.broadcast_to(e, by_n.shape)])

    def law(self, theta: Array) -> Law:
        a, b, e, alpha, beta = map(float, theta)
        return Law(
            E=float(np.exp(e)),
            A=float(np.exp(a + alpha * self.mean_n)),
            B=float(np.exp(b + beta * self.mean_d)),
            alpha=alpha,
            beta=beta,
        )

    def starts(self) -> Array:
        """The grid in terms of theta, the best first: [starts, 5]."""
        theta = np.array(GRID)
        theta[:, 0] -= theta[:, 3] * self.mean_n
        theta[:, 1] -= theta[:, 4] * self.mean_d
        return theta[np.argsort(self.values(theta), kind="stable")]

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Exponents do not become negative: that would be no law."""
        return [(-60, 60), (-60, 60), (-60, 60), (0, 20), (0, 20)]

    def descend(self, start: Array, tolerance: float = 1e-13) -> tuple[float, Array]:
        """(value, theta) where L-BFGS ends."""
        found = optimize.minimize(
            self,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=self.bounds,
            options={"maxiter": 2000, "maxls": 50, "ftol": tolerance, "gtol": 1e-9},
        )
        return float(found.fun), found.x


@dataclasses.dataclass(frozen=True)
class Fit:
    """The law, and what its intervals are made from.

    Attributes:
        value: of the objective, the mean Huber loss in units of delta^2.
        residuals: [R] log of the law - log L.
        draws: laws of the runs drawn again; () if none was asked for.
    """

    law: Law
    value: float
    residuals: Array
    draws: tuple[Law, ...] = ()


def fit(
    points: Points,
    *,
    delta: float = DELTA,
    draws: int = 0,
    seed: int = 0,
    num_starts: int = NUM_STARTS,
) -> Fit:
    """Fits the law to runs.

    Args:
        points: at least MIN_POINTS of them (points.check sees to that).
        draws: how many bootstrap draws.
        seed: of the draws.
        num_starts: how many starts of the grid, the best first, are descended from.
    """
    objective = Objective.of(points, delta)
    value, theta, drawn = solve(objective, draws, seed, num_starts)
    laws = tuple(map(objective.law, drawn))
    return Fit(objective.law(theta), value, objective.residuals(theta), laws)


@threadpool_limits.wrap(
    limits=1
)  # a few numbers: the threads of BLAS wait longer for each other than they work
def solve(
    objective: Objective, draws: int, seed: int, num_starts: int = NUM_STARTS
) -> tuple[float, Array, list[Array]]:
    """(value, theta, the thetas of bootstrap draws). A seed draws the same runs for any loss of theirs."""
    value, theta = min((objective.descend(start) for start in objective.starts()[:num_starts]), key=_value)
    rng = np.random.default_rng(seed)
    num_runs = len(objective.log_n)
    drawn: list[Array] = []
    while len(drawn) < draws:
        rows = rng.integers(num_runs, size=num_runs)
        if len(np.unique(objective.log_n[rows])) > 1 and len(np.unique(objective.log_d[rows])) > 1:
            drawn.append(objective.take(rows).descend(theta, 1e-9)[1])
    return value, theta, drawn


def _value(found: tuple[float, Array]) -> float:
    return found[0]


def interval(values: Array, level: float = 0.9) -> tuple[float, float]:
    """The central interval of bootstrap draws (percentiles), without draws that have no such number."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
