"""Optimizer and learning-rate schedules of a stage, in terms of optax."""

import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from neo_jax.params import ParamSpec

Schedule = Callable[[jax.Array], jax.Array]


def cosine(stage: ConfigDict) -> Schedule:
    """Linear warm-up from 0, then a half cosine to min_lr_ratio * peak_lr at the last step.

    `step` counts from 0 within the stage: the first update of a stage with warm-up has rate 0.
    """

    def rate(step: jax.Array) -> jax.Array:
        warmup, peak, floor = stage.warmup_steps, stage.peak_lr, stage.min_lr_ratio
        progress = (step - warmup) / max(1, stage.steps - warmup)
        decayed = (1 + jnp.cos(math.pi * jnp.clip(progress, 0, 1))) / 2 * (1 - floor) + floor
        return peak * jnp.where(step < warmup, step / max(1, warmup), decayed)

    return rate


def linear(stage: ConfigDict) -> Schedule:
    """Linear warm-up from 0, then a straight line to min_lr_ratio * peak_lr at the last step."""

    def rate(step: jax.Array) -> jax.Array:
        warmup, peak, floor = stage.warmup_steps, stage.peak_lr, stage.min_lr_ratio
        progress = jnp.clip((step - warmup) / max(1, stage.steps - warmup), 0, 1)
        return peak * jnp.where(step < warmup, step / max(1, warmup), 1 - progress * (1 - floor))

    return rate


def wsd(stage: ConfigDict) -> Schedule:
    """Warm-up, stable, decay: linear from 0, constant, then a cooldown to min_lr_ratio * peak_lr.

    The cooldown is "1 - sqrt" (Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations"). Before it the rate does not depend on `stage.steps`: one run's checkpoints serve
    runs of many lengths (config.branch).
    """
    start = cooldown_start(stage)

    def rate(step: jax.Array) -> jax.Array:
        warmup, peak, floor = stage.warmup_steps, stage.peak_lr, stage.min_lr_ratio
        progress = jnp.clip((step - start) / max(1, stage.steps - start), 0, 1)
        return peak * jnp.where(step < warmup, step / max(1, warmup), 1 - jnp.sqrt(progress) * (1 - floor))

    return rate


def cooldown_start(stage: ConfigDict) -> int:
    """The step of the stage at which the cooldown of "wsd" starts; not before the warm-up ends."""
    return max(stage.warmup_steps, stage.steps - round(stage.cooldown_share * stage.steps))


SCHEDULES = {"cosine": cosine, "linear": linear, "wsd": wsd}


def adamw(
    stage: ConfigDict, specs: Mapping[str, ParamSpec], trainable: Iterable[str]
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay on matrices. Updates are still to be scaled by -rate.

    The rate is applied by the step from its own counter, so that skipped steps do not delay the schedule.
    """
    decays = {path: specs[path].decays for path in trainable}
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm),
        optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.adam_eps),
        optax.add_decayed_weights(stage.weight_decay, mask=decays),
    )
