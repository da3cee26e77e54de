"""One law over all mixtures of the data for the loss on each source, and the weights that it recommends.

    L(N, D, h) = E + 1 / sum_i C_i h_i^gamma_i + A / N^alpha + B / D^beta

The additive law of Shukor et al. 2025, "Scaling Laws for Optimal Data Mixtures"; h_i is the share of source i
of the training tokens. It is fitted as the law of one mixture is (parametric.py). What the mixture does is
added to what N and D do, so the best weights are the same for every N and D.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from neo_jax.errors import UserError
from neo_jax.scaling import parametric
from neo_jax.scaling.groups import SOURCE_PREFIX, source_columns
from neo_jax.scaling.law import NAMES, Array
from neo_jax.scaling.points import Points, Row, number, select

SHARE_PREFIX = "share/"  # columns of a sweep's table: a source's share of the training tokens
UNSURE = 0.5  # an interval of a share that is wider
SAME = 0.05  # mixtures whose shares all differ by less count as one: draws of documents vary
MEAN = "mean"  # the target of the advice for all losses together
PARTS = (0.1, 0.5, 0.9)  # starts: the mixture's part of the loss that N and D leave
GAMMAS = (0.1, 0.3, 1.0)  # starts
NUM_STARTS = 10  # of the grid, descended from
NUM_BASES = 3  # laws of N and D alone that those are combined with


@dataclasses.dataclass(frozen=True)
class MixtureLaw:
    """The law of one loss over k sources; C and gamma are [k]."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    C: Array
    gamma: Array

    def floor(self, shares: ArrayLike) -> Array:
        """The loss that N and D leave: shares [..., k] -> [...]."""
        return self.E + 1 / (self.C * np.asarray(shares, float) ** self.gamma).sum(axis=-1)

    def loss(self, n: ArrayLike, d: ArrayLike, shares: ArrayLike) -> Array:
        """L(N, D, h): [...], [...], [..., k] -> [...]."""
        n, d = np.asarray(n, float), np.asarray(d, float)
        return self.floor(shares) + self.A * n**-self.alpha + self.B * d**-self.beta


@dataclasses.dataclass(frozen=True)
class Objective(parametric.Objective):
    """That of parametric.py, over theta = (a, b, e, alpha, beta, c [k] at the mean of log h, gamma [k])."""

    log_h: Array  # [R, k], from their mean; -inf where a source is absent
    mean_h: Array  # [k]

    @classmethod
    def over(cls, points: Points, shares: Array, delta: float) -> "Objective":
        log_h = np.log(shares, where=shares > 0, out=np.full_like(shares, -np.inf))
        mean_h = np.array([column[np.isfinite(column)].mean() for column in log_h.T])
        return cls(**vars(parametric.Objective.of(points, delta)), log_h=log_h - mean_h, mean_h=mean_h)

    def take(self, rows: np.ndarray) -> Self:
        return dataclasses.replace(super().take(rows), log_h=self.log_h[rows])

    def _terms(self, theta: Array) -> Array:
        """The exponents of the four terms: [4, ..., R]."""
        theta = np.asarray(theta)
        exponents = self._exponents(theta)
        top = exponents.max(axis=-1)
        mixed = -top - np.log(np.exp(exponents - top[..., None]).sum(axis=-1))
        return np.concatenate([super()._terms(theta[..., :5]), mixed[None]])

    def _gradient(self, theta: Array, by_term: Array) -> Array:
        parts = special.softmax(self._exponents(theta), axis=-1)  # of each source in the sum over sources
        by_c = -by_term[3][:, None] * parts
        by_gamma = by_c * np.where(parts > 0, self.log_h, 0.0)
        return np.concatenate([super()._gradient(theta, by_term[:3]), by_c.sum(axis=0), by_gamma.sum(axis=0)])

    def _exponents(self, theta: Array) -> Array:
        """log(C_i h_i^gamma_i): theta [..., 5 + 2k] -> [..., R, k]."""
        c, gamma = np.split(theta[..., 5:], 2, axis=-1)
        return c[..., None, :] + gamma[..., None, :] * self.log_h

    @property
    def bounds(self) -> list[tuple[float, float]]:
        k = len(self.mean_h)
        return [*super().bounds, *[(-60.0, 60.0)] * k, *[(1e-3, 20.0)] * k]

    def starts(self) -> Array:
        """Laws of N and D alone, whose floor becomes the mixture's in part: [starts, 5 + 2k], best first."""
        k, least = len(self.mean_h), np.exp(self.log_loss.min())
        alone = parametric.Objective(
            self.log_n, self.log_d, self.log_loss, self.mean_n, self.mean_d, self.delta
        )
        bases = [alone.descend(start)[1] for start in alone.starts()[:NUM_BASES]]
        found = []
        for (a, b, e, *exponents), part, gamma in itertools.product(bases, PARTS, GAMMAS):
            level = max(np.exp(e), least / 2)
            c = -np.log(part * level * k)
            found.append([a, b, np.log((1 - part) * level), *exponents, *[c] * k, *[gamma] * k])
        theta = np.array(found)
        return theta[np.argsort(self.values(theta), kind="stable")]

    def mixture_law(self, theta: Array) -> MixtureLaw:
        c, gamma = np.split(theta[5:], 2)
        return MixtureLaw(**vars(self.law(theta[:5])), C=np.exp(c - gamma * self.mean_h), gamma=gamma)


@dataclasses.dataclass(frozen=True)
class MixtureFit:
    """As parametric.Fit."""

    law: MixtureLaw
    value: float
    residuals: Array
    draws: tuple[MixtureLaw, ...] = ()


def fit(
    points: Points,
    shares: Array,
    *,
    delta: float = parametric.DELTA,
    draws: int = 0,
    seed: int = 0,
    num_starts: int = NUM_STARTS,
) -> MixtureFit:
    """Fits the law to runs; see `parametric.fit`. shares: [R, k], which sum to 1."""
    objective = Objective.over(points, shares, delta)
    value, theta, drawn = parametric.solve(objective, draws, seed, num_starts)
    laws = tuple(map(objective.mixture_law, drawn))
    return MixtureFit(objective.mixture_law(theta), value, objective.residuals(theta), laws)


def optimum(laws: Sequence[MixtureLaw]) -> Array:
    """The shares [k] of least mean loss by some laws, for any N and D: the lowest of several descents."""
    c, gamma = (np.stack([getattr(law, name) for law in laws]) for name in ("C", "gamma"))

    def mean_term(logits: Array) -> tuple[float, Array]:
        shares = special.softmax(logits)
        parts = c * shares**gamma  # [laws, k]
        total = parts.sum(axis=1, keepdims=True)
        by_log_share = -(gamma * parts / total**2).mean(axis=0)
        return float((1 / total).mean()), by_log_share - shares * by_log_share.sum()

    k = c.shape[1]
    starts = [np.zeros(k), *3.0 * np.eye(k)]  # in the middle, and towards each corner
    bounds, options = [(-20.0, 20.0)] * k, {"ftol": 1e-14, "gtol": 1e-10}
    found = [
        optimize.minimize(mean_term, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        for start in starts
    ]
    return special.softmax(min(found, key=lambda one: one.fun).x)


@dataclasses.dataclass(frozen=True)
class Advice:
    """The best weights for the loss on one source, or for the mean of all.

    Attributes:
        target: the source, or MEAN.
        weights: [k] shares of the training tokens.
        draws: [draws, k], the same by each bootstrap draw.
        loss: by the law, for the largest N and D that were trained.
        inside: whether every weight lies between the least and the largest share that was trained.
    """

    target: str
    weights: Array
    draws: Array
    loss: float
    inside: bool


@dataclasses.dataclass(frozen=True)
class Mixtures:
    """
    Attributes:
        sources: names, in the order of shares and weights.
        num_runs, num_mixtures: that the laws are fitted to.
        fits: target -> its law.
    """

    sources: tuple[str, ...]
    num_runs: int
    num_mixtures: int
    fits: Mapping[str, MixtureFit]
    advice: Sequence[Advice]

    @property
    def warnings(self) -> list[str]:
        """What a reader should know before believing the weights."""
        said = []
        for one in self.advice:
            for name, column in zip(self.sources, one.draws.T, strict=True):
                low, high = parametric.interval(column)
                if high - low > UNSURE:
                    said.append(
                        f"The best mixture ({one.target}) is not known: 90 % of the draws give {name} "
                        f"{low:.0%} to {high:.0%}."
                    )
                    break
        return said

    def as_dict(self) -> dict[str, Any]:
        return {
            "sources": list(self.sources),
            "runs": self.num_runs,
            "num_mixtures": self.num_mixtures,
            "laws": {target: self._law(fit) for target, fit in self.fits.items()},
            "advice": [
                {
                    "target": one.target,
                    "weights": self._by_source(one.weights),
                    "intervals": {
                        name: list(parametric.interval(column))
                        for name, column in zip(self.sources, one.draws.T, strict=True)
                    },
                    "loss": one.loss,
                    "inside": one.inside,
                }
                for one in self.advice
            ],
        }

    def _law(self, fit: MixtureFit) -> dict[str, Any]:
        law = fit.law
        return {name: getattr(law, name) for name in NAMES} | {
            "C": self._by_source(law.C),
            "gamma": self._by_source(law.gamma),
            "intervals": {
                name: list(parametric.interval(np.array([getattr(one, name) for one in fit.draws])))
                for name in NAMES
            },
            "mean_abs_residual": float(np.abs(fit.residuals).mean()),
        }

    def _by_source(self, values: Array) -> dict[str, float]:
        return dict(zip(self.sources, map(float, values), strict=True))


def over_mixtures(
    rows: Sequence[Row], columns: Mapping[str, Any], *, delta: float, draws: int, seed: int
) -> tuple[Mixtures | None, str]:
    """(the laws over the mixtures of a table, why there are none). ("" for a table that tells of one source)

    Runs of all arms take part. The targets are the losses by source, or the loss where the table has no such.
    """
    names = sorted({name for row in rows for name in row if name.startswith(SHARE_PREFIX)})
    if len(names) < 2:
        return None, ""
    try:
        points = select(rows, **columns)
    except UserError as error:
        return None, str(error)
    shares = np.array([[number(row.get(name)) for name in names] for row in points.rows])
    usable = np.isfinite(shares).all(axis=1) & (shares >= 0).all(axis=1) & (shares.sum(axis=1) > 0)
    if not usable.all():
        return None, f"{(~usable).sum()} of {len(points)} runs do not tell the shares of all sources"
    trained = (shares > 0).any(axis=0)
    names, shares = [name for name, used in zip(names, trained, strict=True) if used], shares[:, trained]
    shares /= shares.sum(axis=1, keepdims=True)
    num_mixtures, least = count(shares), 2 * len(names) + 1
    if len(names) < 2 or num_mixtures < least:
        return None, (
            f"the runs have {num_mixtures} different mixtures of {len(names)} sources; a law over mixtures "
            f"needs at least {least}"
        )
    if len(points) < 5 + least:
        return None, f"{len(points)} runs; a law over mixtures of {len(names)} sources needs {5 + least}"
    fits = {}
    for target, losses in _targets(points).items():
        its = dataclasses.replace(points, loss=losses)
        fits[target] = fit(its, shares, delta=delta, draws=draws, seed=seed)
    n, d = float(points.n.max()), float(points.d.max())
    groups = {target: [one] for target, one in fits.items()}
    if len(fits) > 1:
        groups = {MEAN: list(fits.values()), **groups}
    advice = [_advice(target, its, shares, n, d) for target, its in groups.items()]
    sources = tuple(name.removeprefix(SHARE_PREFIX) for name in names)
    return Mixtures(sources, len(points), num_mixtures, fits, advice), ""


def _targets(points: Points) -> dict[str, Array]:
    """Name -> losses [R], of every source that all runs have a loss of."""
    found = {}
    for column in source_columns(points.rows):
        losses = np.array([number(row.get(column)) for row in points.rows])
        if (losses > 0).all():  # not where one is NaN
            found[column.removeprefix(SOURCE_PREFIX)] = losses
    return found or {"loss": points.loss}


def _advice(target: str, fits: Sequence[MixtureFit], shares: Array, n: float, d: float) -> Advice:
    laws = [one.law for one in fits]
    weights = optimum(laws)
    drawn = [optimum(of_draw) for of_draw in zip(*(one.draws for one in fits), strict=True)]
    loss = float(np.mean([law.loss(n, d, weights) for law in laws]))
    low, high = shares.min(axis=0), shares.max(axis=0)
    inside = bool(((weights >= low - 1e-3) & (weights <= high + 1e-3)).all())
    return Advice(target, weights, np.reshape(drawn, (len(drawn), len(weights))), loss, inside)


def count(shares: Array) -> int:
    """How many different mixtures there are among shares [R, k]."""
    found: list[Array] = []
    for one in shares:
        if all(np.abs(one - other).max() > SAME for other in found):
            found.append(one)
    return len(found)
