"""Route: which weights a token uses, per module.

    shared    every token the same weights
    modality  visual tokens (patches and slots) have weights of their own (EVEv2, Mono-InternVL, BREEN)
    topk      a router that is trained chooses a token's experts, in the MLP only (experts.py)

A module routed by modality holds the same module twice, `text` and `visual`. It does not run both on all
tokens: each row's tokens are permuted so that text comes first and visual tokens last, cut at a static place,
and put back. The cut is `visual_share` of the row (config.model.route); the packer keeps both budgets,
padding fills them up, and the products together cost what the dense layer costs. Without a cut (share 0:
evaluation, prompts) both run on all tokens and are blended, the definition that the permuted form is tested
against.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from data_pipelines import schema
from neo_jax.mesh import constrain


class Routing(NamedTuple):
    """Where the tokens of a batch go."""

    real: jax.Array  # [B, L] bool, no padding
    visual: jax.Array  # [B, L] bool
    order: jax.Array | None  # [B, L] int32, positions with the text ones first; None = blend
    inverse: jax.Array | None  # [B, L] int32, undoes `order`
    num_text: int  # static: the first num_text places of `order` take the text weights


def is_visual(kinds: jax.Array) -> jax.Array:
    """True for patches and slots, the tokens that modality routing calls visual."""
    return (kinds == schema.PATCH) | (kinds == schema.SLOT)


def budgets(row_tokens: int, visual_share: float) -> tuple[int, int]:
    """(text, visual) tokens that a row may hold when its cut is at `visual_share`."""
    visual = round(row_tokens * visual_share)
    return row_tokens - visual, visual


def routing(kinds: jax.Array, visual_share: float) -> Routing:
    """Sorts each row's text before its visual tokens; padding lies between and fills both sides."""
    real, visual = kinds != schema.PAD, is_visual(kinds)
    if not visual_share:
        return Routing(real, visual, None, None, 0)
    rank = jnp.where(real, jnp.where(visual, 2, 0), 1)
    order = jnp.argsort(rank, axis=1, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order, axis=1).astype(jnp.int32)
    return Routing(real, visual, order, inverse, budgets(kinds.shape[1], visual_share)[0])


def misrouted(batch: Mapping[str, jax.Array], visual_share: float) -> jax.Array:
    """Tokens beyond their side's budget (int32 scalar): the wrong weights would serve them."""
    if not visual_share:
        return jnp.zeros((), jnp.int32)
    kinds = batch["kinds"]
    visual = is_visual(kinds).sum(axis=1)
    text = (kinds != schema.PAD).sum(axis=1) - visual
    text_budget, visual_budget = budgets(kinds.shape[1], visual_share)
    return (jnp.maximum(text - text_budget, 0) + jnp.maximum(visual - visual_budget, 0)).sum()


class Routed(nnx.Module):
    """The same module twice, one for each modality."""

    def __init__(self, build: Callable[[], nnx.Module], permutes: bool):
        self.text, self.visual = build(), build()
        self.permutes = permutes

    def __call__(self, x_BLD: jax.Array, routing: Routing | None) -> Any:
        """Applies both to their tokens; without a routing all tokens are text, as in decoding."""
        if routing is None:
            return self.text(x_BLD)
        if not self.permutes or routing.order is None:
            both = self.text(x_BLD), self.visual(x_BLD)
            return jax.tree.map(lambda t, v: jnp.where(_expand(routing.visual, t), v, t), *both)
        x_BLD = by_rows(permute(by_rows(x_BLD), routing.order, routing.inverse))
        text = self.text(by_rows(x_BLD[:, : routing.num_text]))
        visual = self.visual(by_rows(x_BLD[:, routing.num_text :]))

        def join(text: jax.Array, visual: jax.Array) -> jax.Array:
            both = by_rows(jnp.concatenate([by_rows(text), by_rows(visual)], axis=1))
            return by_rows(permute(both, routing.inverse, routing.order))

        return jax.tree.map(join, text, visual)


def by_rows(x: jax.Array) -> jax.Array:
    """x [B, L, ...] split over the mesh as activations are elsewhere.

    Permuted, or in two parts, XLA would split them as the weights, and add up activations over all devices.
    """
    return constrain(x, "batch", "length")


def routed(kind: str, build: Callable[[], nnx.Module], permutes: bool = True) -> nnx.Module:
    """`build()` once, or once per modality. What has no matrices need not permute: blending costs less."""
    return build() if kind == "shared" else Routed(build, permutes)


def apply(module: nnx.Module, x_BLD: jax.Array, routing: Routing | None) -> Any:
    return module(x_BLD, routing) if isinstance(module, Routed) else module(x_BLD)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[b, order[b, i]] for x [B, L, ...]; its gradient is the inverse permutation, not a scatter."""
    return jnp.take_along_axis(x, _expand(order, x), axis=1)


permute.defvjp(
    lambda x, order, inverse: (permute(x, order, inverse), (order, inverse)),
    lambda orders, g: (permute(g, orders[1], orders[0]), None, None),
)


def _expand(x_BL: jax.Array, like: jax.Array) -> jax.Array:
    """[B, L] -> [B, L, 1, ...] with as many dimensions as `like`."""
    return x_BL.reshape(x_BL.shape + (1,) * (like.ndim - 2))
