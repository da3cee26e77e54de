"""Splash attention on TPU over intervals that are only known at run time.

JAX's Pallas kernel (Splash: block-sparse flash attention) can evaluate a mask function of (one int32 per
query, index of the key) inside the kernel, and the int32s are an array given at run time. Ours hold both
ends of the query's interval, 16 bits each. The block table, which says what is skipped, is computed on the
device from per-block minima and maxima of the same two vectors. No [L, L] array exists anywhere.

Dimensions: as in chunked.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel_lib,
    splash_attention_mask_info as mask_lib,
)

from neo_jax.errors import UserError
from neo_jax.model.mask import Intervals

BLOCKS = (512, 256, 128)  # candidates for queries and keys per block; the first that divides the row
LANES = 128  # rows are padded to a multiple of this
MAX_KEYS = 2**16 - 1  # an end is one past the last key and must fit 16 bits


def splash(
    q_BLNd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    intervals: Intervals,
    scale: float,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The same function as `reference`: [B, L, N, d_v] in the dtype of v, softmax in float32.

    Every query must attend a key. `interpret` runs the kernel on a CPU, for tests.

    Raises:
        UserError: more than MAX_KEYS keys.
    """
    L, S = q_BLNd.shape[1], k_BSKd.shape[1]
    if S > MAX_KEYS:
        raise UserError(
            f"attention 'splash' takes rows of at most {MAX_KEYS} tokens, got {S}; lower row_tokens, or set "
            "model.attention to 'xla_chunked'"
        )
    q = (q_BLNd.astype(jnp.float32) * scale).astype(q_BLNd.dtype)
    q, k, v = (_pad(x).swapaxes(1, 2) for x in (q, k_BSKd, v_BSKd))  # [B, heads, L, d]
    # Padding queries repeat the last one: a query without keys would divide by zero.
    start, end = (_pad(x, mode="edge") for x in intervals)
    query_block, key_block = (block or _block(x.shape[2]) for x in (q, k))
    sizes = kernel_lib.BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_kv_compute=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        block_kv_dkv_compute=key_block,
        block_q_dq=query_block,
        block_kv_dq=key_block,
    )

    def row(inputs: tuple) -> jax.Array:
        q, k, v, start, end = inputs
        forward, backward = _tables(start, end, query_block, key_block, k.shape[1] // key_block)
        kernel = kernel_lib.SplashAttentionKernel(
            forward,
            forward,
            backward,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=kernel_lib.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=_inside,
            interpret=interpret,
        )
        return kernel(q, k, v)

    rows = (q, k, v, start, end)
    # One row needs no loop; several cannot share a grid, as each skips other blocks.
    out = row(jax.tree.map(lambda x: x[0], rows))[None] if q.shape[0] == 1 else jax.lax.map(row, rows)
    return out.swapaxes(1, 2)[:, :L].astype(v.dtype)


def _pack(start: jax.Array, end: jax.Array) -> jax.Array:
    """Both ends of an interval in one int32."""
    return jax.lax.shift_left(start, 16) | end


def _inside(interval: jax.Array, key: jax.Array) -> jax.Array:
    """The kernel's mask function: does the packed interval hold the key?"""
    start = jax.lax.shift_right_logical(interval, 16)
    return (start <= key) & (key < (interval & 0xFFFF))


def _tables(
    start: jax.Array, end: jax.Array, query_block: int, key_block: int, num_key_blocks: int
) -> tuple[mask_lib.MaskInfo, mask_lib.MaskInfo]:
    """Block tables of one row, for the kernels that run over key blocks and for the one over query blocks.

    `block_mask` is 1 where a block holds an attended pair, 0 where it is skipped. `data_next` says which
    block is in memory at each step: steps that are skipped stay at the nearest that is not, so nothing is
    fetched for them.
    """
    first = start.reshape(-1, query_block).min(axis=1, keepdims=True) // key_block
    last = (end.reshape(-1, query_block).max(axis=1, keepdims=True) - 1) // key_block
    keys = jnp.arange(num_key_blocks, dtype=jnp.int32)[None]
    live = (first <= keys) & (keys <= last)  # [query blocks, key blocks]
    num = live.shape[0]
    queries = jnp.arange(num, dtype=jnp.int32)[:, None]
    first_query = jnp.argmax(live, axis=0, keepdims=True)
    last_query = num - 1 - jnp.argmax(live[::-1], axis=0, keepdims=True)
    # Between the first and the last query block of a key block there may be dead ones where intervals have no
    # order; they are skipped all the same.

    def table(next_block: jax.Array) -> mask_lib.MaskInfo:
        return mask_lib.MaskInfo(
            data_next=next_block.astype(jnp.int32)[None],
            mask_next=None,
            block_mask=live.astype(jnp.int32)[None],
            partial_mask_blocks=None,
            q_sequence=_pack(start, end),
        )

    return table(jnp.clip(keys, first, last)), table(jnp.clip(queries, first_query, last_query))


def _pad(x: jax.Array, **how: Any) -> jax.Array:
    """Pads the second axis to a multiple of LANES."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES)] + [(0, 0)] * (x.ndim - 2), **how)


def _block(size: int) -> int:
    return next(block for block in BLOCKS if size % block == 0)
