"""L(N, D) = E + A / N^alpha + B / D^beta, and what follows from it.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (Chinchilla), section 3.3 and appendix
D.
N: parameters, D: training tokens, C: FLOPs = k N D with k = 6 for large dense models (forward and backward),
L: nats per token.
"""

import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
NAMES = ("E", "A", "B", "alpha", "beta")
NOTHING = 1e-3  # E, alpha or beta below this: the data shows no such term

Array: TypeAlias = NDArray[np.float64]


def or_zero(name: str, value: float) -> float:
    """One of a law's numbers as a person is told it: a fit comes close to 0 and does not reach it."""
    return 0.0 if name in ("E", "alpha", "beta") and value < NOTHING else value


@dataclasses.dataclass(frozen=True)
class Law:
    """One law; all five numbers are positive, or 0 where the data shows no such term."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: ArrayLike, d: ArrayLike) -> Array:
        """L(N, D), elementwise."""
        n, d = np.asarray(n, float), np.asarray(d, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    @property
    def exponents(self) -> dict[str, float]:
        """Of the compute-optimal frontier: N ~ C^a, D ~ C^b, L - E ~ C^-c, D ~ N^d.

        c here is of the reducible loss; frontier.py fits a power law to the loss itself, as Shukor et al. do.
        Not
        a number where alpha or beta is 0: then there is no optimum.
        """
        total = self.alpha + self.beta
        if not self.alpha > 0 or not self.beta > 0:
            return dict.fromkeys(("a", "b", "c_reducible", "d"), math.nan)
        return {
            "a": self.beta / total,
            "b": self.alpha / total,
            "c_reducible": self.alpha * self.beta / total,
            "d": self.alpha / self.beta,
        }

    def optimum(self, flops: ArrayLike, k: float = FLOPS_PER_PARAMETER_AND_TOKEN) -> tuple[Array, Array]:
        """(N, D) of least loss with k N D = flops, elementwise: the closed form.

        alpha A / N^alpha = beta B / D^beta at the optimum, from which N = G (C/k)^a and D = (C/k)^b / G with
        G = (alpha A / (beta B))^(1 / (alpha + beta)).
        """
        product, exponents = np.asarray(flops, float) / k, self.exponents
        scale = math.nan  # no optimum: one of the terms is not there
        if self.alpha > 0 and self.beta > 0:
            scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return scale * product ** exponents["a"], product ** exponents["b"] / scale

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
