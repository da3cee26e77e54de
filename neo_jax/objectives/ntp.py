"""Next-token prediction: weighted cross-entropy without ever holding the [B, L, V] logits.

Only supervised positions meet the output matrix: a device sorts its positions, supervised ones first, and
visits as many chunks of them as there are. Patches and padding predict nothing, and are most of some rows.

Dimensions: B rows, L positions, T = B * L, C positions per chunk, D width, V vocabulary.
"""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from neo_jax import mesh as mesh_lib

Gradients = tuple[Array, Array]  # of hidden states and head

# Positions of a device computed at a time: the live logits are [C, V], however long its rows.
CHUNK = 512
CPU_CHUNK = 128  # a chunk costs next to nothing there, and less of the last one is wasted
SPLIT = ("data", "fsdp", "context")  # axes of the mesh whose devices take positions of their own


def dense_cross_entropy(
    hidden_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array
) -> tuple[Array, Array]:
    """The definition, for tests: same results as `cross_entropy`, through the full logits."""
    ce, _ = _cross_entropy_of(hidden_BLD, head_DV.astype(hidden_BLD.dtype), targets_BL)
    ce = jnp.where(weights_BL > 0, ce, 0.0)
    return jnp.sum(ce * weights_BL), ce


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, chunk: int | None = None
) -> tuple[Array, Array]:
    """Sum of weights * CE(hidden @ head, targets), and the cross-entropy of each supervised position.

    Args:
        hidden_BLD: final hidden states, any float dtype; logits are float32.
        head_DV: output matrix, float32.
        targets_BL: int32, already aligned with the position that predicts them.
        weights_BL: float32, 0 where nothing is predicted.
        chunk: positions of a device computed at a time; None = as suits the platform.

    Returns:
        (float32 scalar, [B, L] float32 with 0 where the weight is 0). Only the scalar has a gradient.

    Because the scalar is linear in its cotangent, the forward pass of a differentiated call already builds
    the gradients, chunk by chunk, and the backward pass only scales them: logits are computed once.
    """
    return _forward(hidden_BLD, head_DV, targets_BL, weights_BL, chunk, with_gradients=False)[0]


def _cross_entropy_fwd(
    hidden_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, chunk: int | None
) -> tuple[tuple[Array, Array], Gradients]:
    return _forward(hidden_BLD, head_DV, targets_BL, weights_BL, chunk, with_gradients=True)


def _cross_entropy_bwd(
    chunk: int | None, gradients: Gradients, cotangents: tuple[Array, Array]
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
    chunk: int | None,
    with_gradients: bool,
) -> tuple[tuple[Array, Array], Gradients]:
    """The results, and the gradients of the scalar (meaningless without `with_gradients`).

    On a mesh every device takes its own positions: the head's parts are gathered once, and its gradient is
    summed once, after the last chunk.
    """
    chex.assert_equal_shape([targets_BL, weights_BL])
    chex.assert_equal_shape_prefix([hidden_BLD, targets_BL], 2)
    mesh = jax.sharding.get_abstract_mesh()
    split = mesh_lib.partition(("batch", "length"))
    local = partial(_local, chunk=chunk, with_gradients=with_gradients)
    inputs = hidden_BLD, head_DV, targets_BL, weights_BL
    # Where one device has all positions there are no collectives: on a CPU they copy the head and its
    # gradient, and over axes of one device, beside "tensor", XLA refuses to compile them.
    devices = math.prod(mesh.shape.get(axis, 1) for axis in SPLIT)
    if devices == 1 or mesh_lib.divisible(mesh, targets_BL.shape, split) != split:
        ce, gradients = local(*inputs)
    else:

        def on_shard(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, Gradients]:
            head = lax.all_gather(head.astype(hidden.dtype), "fsdp", axis=0, tiled=True)
            ce, (d_hidden, d_head) = local(hidden, head, targets, weights)
            if with_gradients:
                d_head = lax.psum_scatter(d_head, "fsdp", scatter_dimension=0, tiled=True)
                d_head = lax.psum(d_head, ("data", "context"))
            return ce, (d_hidden, d_head)

        # The axis "tensor", over which the vocabulary is split, stays XLA's business.
        width = PartitionSpec(*split, None)
        head_split = PartitionSpec("fsdp", None) if with_gradients else PartitionSpec()
        ce, gradients = jax.shard_map(
            on_shard,
            in_specs=(width, PartitionSpec("fsdp", None), split, split),
            out_specs=(split, (width if with_gradients else PartitionSpec(), head_split)),
            axis_names=set(SPLIT),
            check_vma=False,
        )(*inputs)
    return (jnp.sum(ce * weights_BL), ce), gradients


def _local(
    hidden_BLD: Array,
    head_DV: Array,
    targets_BL: Array,
    weights_BL: Array,
    chunk: int | None,
    with_gradients: bool,
) -> tuple[Array, Gradients]:
    """Cross-entropy [B, L] and gradients of one device's rows."""
    B, L, D = hidden_BLD.shape
    T = B * L
    C = chunk or min(T, CPU_CHUNK if mesh_lib.platform() == "cpu" else CHUNK)
    head = head_DV.astype(hidden_BLD.dtype)
    supervised = (weights_BL > 0).reshape(T)
    order = jnp.argsort(~supervised, stable=True)
    place = jnp.argsort(order)
    num_chunks = (supervised.sum() + C - 1) // C

    def sort(x: Array) -> Array:  # [B, L, ...] -> [T, ...], supervised first, zero-padded to whole chunks
        x = jnp.take(x.reshape(T, *x.shape[2:]), order, axis=0)
        return jnp.pad(x, [(0, -T % C)] + [(0, 0)] * (x.ndim - 1))

    hidden, targets, weights = map(sort, (hidden_BLD, targets_BL, weights_BL))

    def step(index: Array, carry: tuple) -> tuple:
        ce, d_hidden, d_head = carry
        x, target, weight = (lax.dynamic_slice_in_dim(y, index * C, C) for y in (hidden, targets, weights))
        chunk_ce, probabilities = _cross_entropy_of(x, head, target)
        ce = lax.dynamic_update_slice_in_dim(ce, chunk_ce, index * C, 0)
        if with_gradients:
            is_target = jnp.arange(head.shape[1], dtype=target.dtype)[None] == target[:, None]
            d_logits = ((probabilities - is_target) * weight[:, None]).astype(x.dtype)
            d_head += jnp.einsum("CD,CV->DV", x, d_logits, preferred_element_type=jnp.float32)
            d_x = jnp.einsum("CV,DV->CD", d_logits, head)
            d_hidden = lax.dynamic_update_slice_in_dim(d_hidden, d_x, index * C, 0)
        return ce, d_hidden, d_head

    nothing = jnp.zeros(())
    d_hidden = jnp.zeros(hidden.shape, hidden.dtype) if with_gradients else nothing
    d_head = jnp.zeros(head.shape, jnp.float32) if with_gradients else nothing
    ce, d_hidden, d_head = lax.fori_loop(
        0, num_chunks, step, (jnp.zeros(targets.shape, jnp.float32), d_hidden, d_head)
    )
    ce = jnp.where(weights_BL > 0, ce[place].reshape(B, L), 0.0)
    return ce, (d_hidden[place].reshape(B, L, D) if with_gradients else nothing, d_head)


def _cross_entropy_of(hidden: Array, head: Array, targets: Array) -> tuple[Array, Array]:
    """Cross-entropy [...] and probabilities [..., V], float32, of hidden [..., D]."""
    logits = jnp.einsum("...D,DV->...V", hidden, head, preferred_element_type=jnp.float32)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (log_normaliser - picked)[..., 0], jnp.exp(logits - log_normaliser)
