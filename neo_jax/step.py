"""One training step, and the sums that a loss is made of: pure functions, no I/O.

The loss of a step is sum(ce * w) / sum(w) over the whole batch, all hosts and all accumulation parts, so that
packing, sharding and accumulation do not change its value.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from neo_jax import optim
from neo_jax.model.mask import Batch
from neo_jax.model.route import is_visual, misrouted
from neo_jax.model.transformer import Transformer
from neo_jax.objectives.ntp import cross_entropy
from neo_jax.params import Params, ParamSpec, bind
from neo_jax.stages import Stage

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes. The optimizer state covers the trainable parameters only."""

    step: jax.Array  # int32, steps taken since the start of the run
    params: Params
    opt_state: optax.OptState
    nonfinite_steps: jax.Array  # int32, steps skipped since the start of the run


def make_train_step(
    model: Transformer,
    specs: Mapping[str, ParamSpec],
    stage: Stage,
    trainable: frozenset[str],
    num_sources: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `train_step(state, batch) -> (state, metrics)` for one stage; jit it with the state donated.

    A step whose loss or gradient norm is not finite changes neither parameters nor optimizer and is counted.
    """
    optimizer = optim.adamw(stage.config, specs, trainable)
    schedule = optim.SCHEDULES[stage.config.schedule](stage.config)
    parts = stage.config.accumulate

    def gradients(params: Params, batch: Batch) -> tuple[Params, Metrics]:
        """Gradients of the unnormalised loss with respect to the trainable parameters, and the sums."""
        frozen = {path: x for path, x in params.items() if path not in trainable}

        def loss(trained: Params) -> tuple[jax.Array, Metrics]:
            sums = loss_sums(bind(model, frozen | trained), batch, num_sources)
            return sums["loss"], sums

        return jax.grad(loss, has_aux=True)({path: params[path] for path in sorted(trainable)})

    def accumulated(params: Params, batch: Batch) -> tuple[Params, Metrics]:
        if parts == 1:
            return gradients(params, batch)

        def split(
            x: jax.Array,
        ) -> jax.Array:  # parts take rows from all over the batch: each device keeps its own
            return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

        def add(total: tuple, part: Batch) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, gradients(params, part)), None

        batches = jax.tree.map(split, dict(batch))
        zero = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], batches))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)
        return jax.lax.scan(add, zero, batches)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = accumulated(state.params, batch)
        total_weight = jnp.maximum(sums["weight"], jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / total_weight, grads)
        grad_norm = optax.global_norm(grads)
        rate = schedule(state.step - stage.start)

        trained = {path: state.params[path] for path in grads}
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"])
        trained = jax.tree.map(lambda p, u: jnp.where(finite, p - rate * u, p), trained, updates)
        opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), opt_state, state.opt_state)
        state = TrainState(
            step=state.step + 1,
            params=state.params | trained,
            opt_state=opt_state,
            nonfinite_steps=state.nonfinite_steps + ~finite,
        )
        metrics = sums | {
            "loss": sums["loss"] / total_weight,
            "grad_norm": grad_norm,
            "lr": rate,
            "nonfinite_steps": state.nonfinite_steps,
        }
        return state, metrics

    return train_step


def loss_sums(model: Transformer, batch: Batch, num_sources: int) -> Metrics:
    """Sums over a batch; add them over batches, then divide `loss` by `weight`.

    `source_loss` and `source_weight` are [num_sources]; `attended_pairs` counts (query, key) pairs.
    """
    loss, ce = cross_entropy(model(batch), model.head_DV(), batch["targets"], batch["loss_weights"])
    weights, kinds = batch["loss_weights"], batch["kinds"]
    intervals = model.intervals(batch)
    pairs = jnp.where(kinds > 0, intervals.end - intervals.start, 0)

    def by_source(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x.ravel(), batch["source_ids"].ravel(), num_sources)

    return {
        "loss": loss,
        "weight": weights.sum(),
        "source_loss": by_source(ce * weights),
        "source_weight": by_source(weights),
        "tokens": (kinds > 0).sum(),
        "visual_tokens": is_visual(kinds).sum(),
        "misrouted_tokens": misrouted(batch, model.visual_share if model.routes else 0.0),
        "patches": (batch["patch_index"] >= 0).sum(),
        "supervised_tokens": (weights > 0).sum(),
        "documents": batch["segment_ids"].max(axis=1).sum(),
        "images": batch["image_ids"].max(axis=1).sum(),
        "attended_pairs": pairs.astype(jnp.float32).sum(),
    }


def initial_state(
    params: Params, specs: Mapping[str, ParamSpec], stage: Stage, trainable: frozenset[str]
) -> TrainState:
    """A state at the start of the run's first stage."""
    state = TrainState(jnp.zeros((), jnp.int32), params, (), jnp.zeros((), jnp.int32))
    return enter_stage(state, specs, stage, trainable)


def enter_stage(
    state: TrainState, specs: Mapping[str, ParamSpec], stage: Stage, trainable: frozenset[str]
) -> TrainState:
    """The same parameters with a fresh optimizer for the stage's trainable ones."""
    trained = {path: state.params[path] for path in sorted(trainable)}
    opt_state = optim.adamw(stage.config, specs, trainable).init(trained)
    return dataclasses.replace(state, opt_state=opt_state)
