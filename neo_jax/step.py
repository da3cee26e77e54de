"""One training step, and the sums that a loss is made of: pure functions, no I/O.

The loss of a step is sum(ce * w) / sum(w) over the whole batch, all hosts and all accumulation parts, so that
packing, sharding and accumulation do not change its value. With more objectives than next-token prediction
(config.stage.*.objectives) it is the weighted sum of such quotients.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from neo_jax import objectives, optim
from neo_jax.model.mask import Batch
from neo_jax.model.route import is_visual, misrouted
from neo_jax.model.transformer import Transformer
from neo_jax.objectives.balance import balance
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
    strengths = {name: strength for name, strength in stage.config.objectives.items() if strength > 0}
    first = next(iter(strengths))

    def scales(batch: Batch) -> dict[str, jax.Array | float]:
        """What each objective's sum counts if all sums are then divided by the weight of the first.

        Weights are functions of the batch alone, so one backward pass serves all objectives.
        """
        if len(strengths) == 1:
            return strengths
        weights = objective_weights(model, batch, stage.config)
        unit = {name: _divisor(weights[first]) / _divisor(weight) for name, weight in weights.items()}
        return {name: strength * unit[name] for name, strength in strengths.items()}

    def gradients(params: Params, batch: Batch, scales: Mapping) -> tuple[Params, Metrics]:
        """Gradients of the unnormalised loss with respect to the trainable parameters, and the sums."""
        frozen = {path: x for path, x in params.items() if path not in trainable}

        def loss(trained: Params) -> tuple[jax.Array, Metrics]:
            sums = loss_sums(bind(model, frozen | trained), batch, num_sources, stage.config)
            return sum(scale * sums["objective_loss"][name] for name, scale in scales.items()), sums

        return jax.grad(loss, has_aux=True)({path: params[path] for path in sorted(trainable)})

    def accumulated(params: Params, batch: Batch) -> tuple[Params, Metrics]:
        scale = scales(batch)
        if parts == 1:
            return gradients(params, batch, scale)

        def split(
            x: jax.Array,
        ) -> jax.Array:  # parts take rows from all over the batch: each device keeps its own
            return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

        def add(total: tuple, part: Batch) -> tuple[tuple, None]:
            grads, sums = gradients(params, part, scale)
            # Or XLA adds up all of the head's gradient on every device, and splits it after the last part.
            return jax.tree.map(jnp.add, total, (jax.lax.optimization_barrier(grads), sums)), None

        batches = jax.tree.map(split, dict(batch))
        zero = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], batches), scale)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)
        return jax.lax.scan(add, zero, batches)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = accumulated(state.params, batch)
        losses = {
            name: sums["objective_loss"][name] / _divisor(weight)
            for name, weight in sums["objective_weight"].items()
        }
        total_weight = _divisor(sums["objective_weight"][first])
        total_loss = sum(strength * losses[name] for name, strength in strengths.items())
        grads = jax.tree.map(lambda g: g / total_weight, grads)
        grad_norm = optax.global_norm(grads)
        rate = schedule(state.step - stage.start)

        trained = {path: state.params[path] for path in grads}
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(total_loss)
        trained = jax.tree.map(lambda p, u: jnp.where(finite, p - rate * u, p), trained, updates)
        opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), opt_state, state.opt_state)
        state = TrainState(
            step=state.step + 1,
            params=state.params | trained,
            opt_state=opt_state,
            nonfinite_steps=state.nonfinite_steps + ~finite,
        )
        metrics = sums | {
            "loss": total_loss,
            "objectives": losses,
            "grad_norm": grad_norm,
            "lr": rate,
            "nonfinite_steps": state.nonfinite_steps,
        }
        return state, metrics

    return train_step


def loss_sums(model: Transformer, batch: Batch, num_sources: int, stage: ConfigDict | None = None) -> Metrics:
    """Sums over a batch; add them over batches, then divide `loss` by `weight`.

    `source_loss`, `source_weight` and `source_tokens` are [num_sources]; `attended_pairs` counts (query, key)
    pairs.
    `objective_loss` and `objective_weight` have one entry per objective of `stage`; next-token prediction,
    which `loss` and `weight` are about, and the balance of learned experts are measured also where they are
    none (and alone without a stage). `objective_vectors` is what each head multiplies, for flops.py;
    `expert_tokens` [layers, E] how many tokens took each learned expert.
    """
    heads = _heads(model, stage)
    layers = {layer for head in heads.values() for layer in head.layers}
    hidden, taps, load = model.taps(batch, layers)
    loss, ce = cross_entropy(hidden, model.head_DV(), batch["targets"], batch["loss_weights"])
    weights, kinds = batch["loss_weights"], batch["kinds"]
    intervals = model.intervals(batch)
    pairs = jnp.where(kinds > 0, intervals.end - intervals.start, 0)

    def by_source(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x.ravel(), batch["source_ids"].ravel(), num_sources)

    return {
        "loss": loss,
        "weight": weights.sum(),
        "objective_loss": {"ntp": loss}
        | ({} if load is None else {"balance": balance(load)})
        | {name: head.loss(batch, taps, stage) for name, head in heads.items()},
        "objective_weight": objective_weights(model, batch, stage),
        "objective_vectors": {name: head.vectors(batch, stage) for name, head in heads.items()},
        "source_loss": by_source(ce * weights),
        "source_weight": by_source(weights),
        "source_tokens": by_source((kinds > 0).astype(jnp.int32)),
        "tokens": (kinds > 0).sum(),
        "visual_tokens": is_visual(kinds).sum(),
        "misrouted_tokens": misrouted(batch, model.visual_share if model.routes else 0.0),
        "patches": (batch["patch_index"] >= 0).sum(),
        "supervised_tokens": (weights > 0).sum(),
        "documents": batch["segment_ids"].max(axis=1).sum(),
        "images": batch["image_ids"].max(axis=1).sum(),
        "attended_pairs": pairs.astype(jnp.float32).sum(),
    } | ({} if load is None else {"expert_tokens": load.tokens})


def objective_weights(model: Transformer, batch: Batch, stage: ConfigDict | None) -> dict[str, jax.Array]:
    """What the sum of each objective of a stage is to be divided by."""
    weights = {"ntp": batch["loss_weights"].sum()}
    if model.learns_routes:
        weights["balance"] = (batch["kinds"] > 0).sum().astype(jnp.float32)
    return weights | {name: head.weight(batch, stage) for name, head in _heads(model, stage).items()}


def _heads(model: Transformer, stage: ConfigDict | None) -> dict[str, objectives.Distill]:
    """The heads of a stage's objectives other than next-token prediction, by name."""
    return model.objectives.of(stage) if stage is not None and hasattr(model, "objectives") else {}


def _divisor(weight: jax.Array) -> jax.Array:
    """The weight, or 1 where there is nothing to divide."""
    return jnp.where(weight > 0, weight, 1.0)


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
