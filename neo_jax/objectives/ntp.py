"""Next-token prediction: weighted cross-entropy without ever holding the [B, L, V] logits.

Dimensions: B rows, L positions, C positions per chunk, D width, V vocabulary.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import Array

Gradients = tuple[Array, Array]  # of hidden states and head

CHUNK = 128  # positions per row and chunk; bounds the live logits at [B, CHUNK, V]


def dense_cross_entropy(
    hidden_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array
) -> tuple[Array, Array]:
    """The definition, for tests: same results as `cross_entropy`, through the full logits."""
    ce, _ = _cross_entropy_chunk(hidden_BLD, head_DV.astype(hidden_BLD.dtype), targets_BL)
    ce = jnp.where(weights_BL > 0, ce, 0.0)
    return jnp.sum(ce * weights_BL), ce


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, chunk: int = CHUNK
) -> tuple[Array, Array]:
    """Sum of weights * CE(hidden @ head, targets), and the cross-entropy of each supervised position.

    Args:
        hidden_BLD: final hidden states, any float dtype; logits are float32.
        head_DV: output matrix, float32.
        targets_BL: int32, already aligned with the position that predicts them.
        weights_BL: float32, 0 where nothing is predicted.
        chunk: positions per row computed at a time.

    Returns:
        (float32 scalar, [B, L] float32 with 0 where the weight is 0). Only the scalar has a gradient.

    Because the scalar is linear in its cotangent, the forward pass of a differentiated call already builds
    the gradients, chunk by chunk, and the backward pass only scales them: logits are computed once.
    """
    return _forward(hidden_BLD, head_DV, targets_BL, weights_BL, chunk, with_gradients=False)[0]


def _cross_entropy_fwd(
    hidden_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, chunk: int
) -> tuple[tuple[Array, Array], Gradients | None]:
    return _forward(hidden_BLD, head_DV, targets_BL, weights_BL, chunk, with_gradients=True)


def _cross_entropy_bwd(
    chunk: int, gradients: Gradients, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    scale, _ = cotangents
    d_hidden, d_head = gradients
    return (d_hidden * scale).astype(d_hidden.dtype), d_head * scale, None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _forward(
    hidden_BLD: Array,
    head_DV: Array,
    targets_BL: Array,
    weights_BL: Array,
    chunk: int,
    with_gradients: bool,
) -> tuple[tuple[Array, Array], Gradients | None]:
    chex.assert_equal_shape([targets_BL, weights_BL])
    chex.assert_equal_shape_prefix([hidden_BLD, targets_BL], 2)
    L = targets_BL.shape[1]
    head = head_DV.astype(hidden_BLD.dtype)
    padding = -L % chunk

    def chunks(x: Array) -> Array:  # [B, L, ...] -> [L / C, B, C, ...], zero-padded
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def step(d_head: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, tuple]:
        hidden, targets, weights = inputs
        if not with_gradients:
            return d_head, (_cross_entropy_chunk(hidden, head, targets)[0], None)
        ce, probabilities = _cross_entropy_chunk(hidden, head, targets)
        rows = jnp.arange(targets.shape[0])[:, None], jnp.arange(chunk)[None, :]
        d_logits = (probabilities * weights[..., None]).at[*rows, targets].add(-weights)
        d_logits = d_logits.astype(hidden.dtype)
        d_head += jnp.einsum("BCD,BCV->DV", hidden, d_logits, preferred_element_type=jnp.float32)
        return d_head, (ce, jnp.einsum("BCV,DV->BCD", d_logits, head))

    d_head = jnp.zeros(head_DV.shape, jnp.float32) if with_gradients else jnp.zeros((), jnp.float32)
    d_head, (ce, d_hidden) = jax.lax.scan(
        step, d_head, tuple(map(chunks, (hidden_BLD, targets_BL, weights_BL)))
    )

    def rows(x: Array) -> Array:  # [L / C, B, C, ...] -> [B, L, ...]
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :L]

    ce = jnp.where(weights_BL > 0, rows(ce), 0.0)
    result = jnp.sum(ce * weights_BL), ce
    return result, (rows(d_hidden), d_head) if with_gradients else None


def _cross_entropy_chunk(hidden: Array, head: Array, targets: Array) -> tuple[Array, Array]:
    logits = jnp.einsum("BCD,DV->BCV", hidden, head, preferred_element_type=jnp.float32)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (log_normaliser - picked)[..., 0], jnp.exp(logits - log_normaliser)
