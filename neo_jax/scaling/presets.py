"""Published laws, as they are printed.

Two forms. A full law has all five numbers and gives N and D for a budget. Shukor et al. 2025 ("Scaling Laws
for Native Multimodal Models", arXiv:2504.07951, table 2 and its appendix) print E, alpha, beta and the
exponents of the frontier, N ~ C^a, D ~ C^b, L ~ C^c, D ~ N^d, but not the factors in front; only one factor
of L is printed. N and D
then need one point of the frontier to go through: `Anchor`.
"""

import dataclasses
import math

from neo_jax.errors import UserError
from neo_jax.scaling.law import FLOPS_PER_PARAMETER_AND_TOKEN, Law


@dataclasses.dataclass(frozen=True)
class Exponents:
    """A published frontier without its factors.

    Attributes:
        loss_factor: L = loss_factor C^c, where it is printed.
        caveat: what its advice does not count.
    """

    E: float | None
    alpha: float
    beta: float
    a: float
    b: float
    c: float | None
    d: float | None = None
    loss_factor: float | None = None
    caveat: str = ""


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A compute-optimal model: `n` parameters at `flops`. A sweep of one's own gives one."""

    flops: float
    n: float

    @classmethod
    def of_ratio(cls, flops: float, tokens_per_parameter: float) -> "Anchor":
        """The N for which D = C / 6N is that many times N."""
        return cls(flops, math.sqrt(flops / FLOPS_PER_PARAMETER_AND_TOKEN / tokens_per_parameter))


# Chinchilla's rule of thumb, in the middle of the budgets that Shukor et al. trained with. An assumption, not
# theirs.
DEFAULT_ANCHOR = Anchor.of_ratio(1e21, 20.0)

_LATE = (
    "late fusion spends C = 6 (N_v D_v + N D), and its N_v is not printed: this D is all of C / 6N at the "
    "anchor, too many tokens by what the vision encoder takes"
)

PRESETS: dict[str, Law | Exponents] = {
    # Hoffmann et al. 2022, equation 10; Besiroglu et al. 2024, table 1: the same runs, fitted again.
    "chinchilla_hoffmann": Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "chinchilla_besiroglu": Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
    "shukor_early_avg": Exponents(1.904, 0.301, 0.335, 0.526, 0.473, -0.0492, 0.899, loss_factor=29.57),
    "shukor_early_captions": Exponents(1.569, 0.311, 0.339, 0.520, 0.479, -0.0610, 0.919),
    "shukor_early_interleaved": Exponents(1.966, 0.297, 0.338, 0.532, 0.468, -0.0459, 0.879),
    "shukor_early_text": Exponents(2.222, 0.308, 0.338, 0.525, 0.477, -0.0420, 0.909),
    "shukor_late_avg": Exponents(1.891, 0.290, 0.338, 0.636, 0.462, -0.0494, 0.673, caveat=_LATE),
    "shukor_sparse_early_avg": Exponents(2.158, 0.710, 0.372, 0.361, 0.656, -0.0470, 1.797),  # N: active
    # Early fusion by share of captions, interleaved documents and text, in percent.
    "shukor_mix_45_45_10": Exponents(None, 0.301, 0.335, 0.527, 0.474, -0.0492, loss_factor=29.57),
    "shukor_mix_40_20_40": Exponents(None, 0.328, 0.348, 0.518, 0.486, -0.0486),
    "shukor_mix_30_30_40": Exponents(None, 0.253, 0.338, 0.572, 0.428, -0.0463),
    "shukor_mix_20_40_40": Exponents(None, 0.259, 0.354, 0.582, 0.423, -0.0488),
}


@dataclasses.dataclass(frozen=True)
class Advice:
    """For `flops`, train `n` parameters on `d` tokens; `loss` where the law says one."""

    flops: float
    n: float
    d: float
    loss: float | None
    assumption: str = ""  # what the law itself does not say


def preset(name: str) -> Law | Exponents:
    """Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"--preset={name}: unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def advise(
    law: Law | Exponents,
    flops: float,
    anchor: Anchor | None = None,
    flops_per_nd: float = FLOPS_PER_PARAMETER_AND_TOKEN,
) -> Advice:
    """N and D for a budget of training FLOPs: of least loss with C = k N D, or along the printed frontier.

    Args:
        anchor: for `Exponents` only; DEFAULT_ANCHOR, and said so, where there is none.
        flops_per_nd: k, for a `Law` only; of one's own runs where it was fitted to them.

    Raises:
        UserError: the budget is no positive number, or the law has no optimum.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise UserError(f"--flops={flops:g}: a budget is a positive number of FLOPs, such as 1e21")
    if isinstance(law, Law):
        n, d = (float(value) for value in law.optimum(flops, flops_per_nd))
        if not (math.isfinite(n) and math.isfinite(d)):
            raise UserError(
                f"the law has no optimum: alpha is {law.alpha:g} and beta {law.beta:g}; widen the sweep"
            )
        return Advice(flops, n, d, float(law.loss(n, d)))
    through = anchor or DEFAULT_ANCHOR
    n = through.n * (flops / through.flops) ** law.a
    # By the printed b: 6ND is the budget at the anchor, and off it as exactly as the printed a + b is 1.
    d = through.flops / (FLOPS_PER_PARAMETER_AND_TOKEN * through.n) * (flops / through.flops) ** law.b
    loss = law.loss_factor * flops**law.c if law.loss_factor and law.c else None
    assumed = (
        ""
        if anchor
        else f"the paper prints exponents only: N goes through {through.n:.3g} parameters at "
        f"{through.flops:.0e} FLOPs "
        "(20 tokens per parameter, an assumption); set your own with --anchor=N@FLOPS"
    )
    return Advice(flops, n, d, loss, "; ".join(filter(None, (assumed, law.caveat))))
