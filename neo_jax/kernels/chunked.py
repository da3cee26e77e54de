"""Blockwise attention over intervals in plain JAX: any device, memory linear in L, time in attended pairs.

A block of queries only visits the keys that one of its intervals reaches. Documents are contiguous, so these
are one range per query block, from the least start to the greatest end, and a loop of a length known on the
device visits it, a block of keys at a time from the least start on (online softmax; Milakov & Gimelshein,
2018; Dao et al., 2022). Backward recomputes the weights of each visited block from the saved log-normaliser.

Dimensions: B rows, L queries, S keys, N query heads, K key/value heads, G = N / K, d channels, Q and C
queries and keys of a block, M = G * Q: the G heads of a block of queries below each other.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from neo_jax import mesh as mesh_lib
from neo_jax.model.mask import Intervals

BLOCK = 512, 512  # queries and keys of one visit; rows shorter than this are one block
CPU_BLOCK = 32, 64  # on a CPU: short documents waste less of a block, and a visit costs next to nothing
_ALIGNED = 8  # first keys of visits are multiples of this: a tile's rows on TPUs
_MASKED = -1e30  # below every score, and finite: a difference of two of them is not NaN


class _Blocks(NamedTuple):
    """Queries in blocks, and what each block attends; the leading axis runs over B * L / Q."""

    row: jax.Array  # [B * L / Q] int32, the row of the block
    start: jax.Array  # [B * L / Q, Q] int32
    end: jax.Array  # [B * L / Q, Q] int32
    first: jax.Array  # [B * L / Q] int32, the first key visited
    visits: jax.Array  # [B * L / Q] int32, of C keys each


def xla_chunked(
    q_BLNd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    intervals: Intervals,
    scale: float,
    block: tuple[int, int] | None = None,
) -> jax.Array:
    """The same function as `reference`: [B, L, N, d_v] in the dtype of v, softmax in float32.

    Query and value channels may differ in number; query head n reads key/value head n // G. A query with an
    empty interval gives zeros. `block` (Q, C; None = as suits the platform) bounds the live scores at
    [K, G * Q, C] float32.
    """
    if block is None:
        block = CPU_BLOCK if mesh_lib.platform() == "cpu" else BLOCK
    B, L, N, d = q_BLNd.shape
    S, K = k_BSKd.shape[1:3]
    chex.assert_shape([intervals.start, intervals.end], (B, L))
    chex.assert_equal_shape_prefix([k_BSKd, v_BSKd], 3)
    Q, C = min(block[0], _round_up(L, 8)), min(block[1], _round_up(S, 8))
    start, end = (_pad(x, Q) for x in intervals)  # padding queries attend nothing
    k, v = (_pad(x, C).swapaxes(1, 2) for x in (k_BSKd, v_BSKd))  # [B, K, S, d]
    num = start.shape[1] // Q
    q = _pad(q_BLNd, Q).reshape(B, num, Q, K, N // K, d).transpose(0, 1, 3, 4, 2, 5)
    q = q.reshape(B * num, K, N // K * Q, d)

    start, end = start.reshape(B * num, Q), end.reshape(B * num, Q)
    first = jnp.where(end > start, start, S).min(axis=1) // _ALIGNED * _ALIGNED
    visits = (jnp.where(end > start, end, 0).max(axis=1) - first + C - 1) // C
    blocks = _Blocks(
        row=jnp.repeat(jnp.arange(B, dtype=jnp.int32), num),
        start=start,
        end=end,
        first=jnp.minimum(first, k.shape[2] - visits * C),  # the last visit, too, reads C keys of the row
        visits=visits,
    )
    out = _attend(q, k, v, blocks, scale, C)
    out = out.reshape(B, num, K, N // K, Q, -1).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(B, num * Q, N, -1)[:, :L]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, blocks: _Blocks, scale: float, size: int) -> jax.Array:
    """q [B * L / Q, K, M, d], k and v [B, K, S, d] -> [B * L / Q, K, M, d_v]."""
    return _forward(q, k, v, blocks, scale, size)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: _Blocks, scale: float, size: int
) -> tuple[jax.Array, jax.Array]:
    """The result, and the logarithm of each query's normaliser [B * L / Q, K, M] float32."""
    K, M = q.shape[1:3]

    def query_block(inputs: tuple[jax.Array, _Blocks]) -> tuple[jax.Array, jax.Array]:
        q_KMd, block = inputs

        def visit(index: jax.Array, carry: tuple) -> tuple:
            greatest, total, out = carry
            key = block.first + index * size
            scores = _scores(q_KMd, _take(k, block.row, key, size), block, key, scale)
            grown = jnp.maximum(greatest, scores.max(axis=-1))
            weights = jnp.exp(scores - grown[..., None])
            kept = jnp.exp(greatest - grown)
            part = _product("KMC,KCd->KMd", weights.astype(v.dtype), _take(v, block.row, key, size))
            return grown, total * kept + weights.sum(axis=-1), out * kept[..., None] + part

        empty = jnp.full((K, M), _MASKED / 2), jnp.zeros((K, M)), jnp.zeros((K, M, v.shape[-1]))
        greatest, total, out = lax.fori_loop(0, block.visits, visit, empty)
        total = jnp.where(total > 0, total, 1.0)  # queries that attend nothing
        return (out / total[..., None]).astype(v.dtype), greatest + jnp.log(total)

    return lax.map(query_block, (q, blocks))


def _attend_fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: _Blocks, scale: float, size: int
) -> tuple[jax.Array, tuple]:
    out, log_total = _forward(q, k, v, blocks, scale, size)
    return out, (q, k, v, blocks, out, log_total)


def _attend_bwd(scale: float, size: int, saved: tuple, d_out: jax.Array) -> tuple:
    q, k, v, blocks, out, log_total = saved
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def query_block(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        q_KMd, d_out_KMd, log_total_KM, delta_KM, block = inputs

        def visit(index: jax.Array, carry: tuple) -> tuple:
            d_q, d_k, d_v = carry
            key = block.first + index * size
            keys, values = (_take(x, block.row, key, size) for x in (k, v))
            weights = jnp.exp(_scores(q_KMd, keys, block, key, scale) - log_total_KM[..., None])
            d_v_part = _product("KMC,KMd->KCd", weights.astype(v.dtype), d_out_KMd)
            d_weights = _product("KMd,KCd->KMC", d_out_KMd, values)
            d_scores = (weights * (d_weights - delta_KM[..., None]) * scale).astype(q.dtype)
            d_q += _product("KMC,KCd->KMd", d_scores, keys)
            d_k_part = _product("KMC,KMd->KCd", d_scores, q_KMd)
            return d_q, _add(d_k, d_k_part, block.row, key), _add(d_v, d_v_part, block.row, key)

        d_q, d_k, d_v = lax.fori_loop(0, block.visits, visit, (jnp.zeros(q_KMd.shape, jnp.float32), *carry))
        return (d_k, d_v), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), d_q = lax.scan(query_block, zeros, (q, d_out, log_total, delta, blocks))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _scores(q_KMd: jax.Array, k_KCd: jax.Array, block: _Blocks, key: jax.Array, scale: float) -> jax.Array:
    """Scaled scores [K, M, C] float32 of the keys from `key` on, `_MASKED` outside the intervals."""
    scores = _product("KMd,KCd->KMC", q_KMd, k_KCd) * scale
    K, M, C = scores.shape
    keys = (key + jnp.arange(C, dtype=jnp.int32))[None]
    allowed = (block.start[:, None] <= keys) & (keys < block.end[:, None])
    by_head = scores.reshape(K, M // allowed.shape[0], *allowed.shape)
    return jnp.where(allowed[None, None], by_head, _MASKED).reshape(K, M, C)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _take(x_BKSd: jax.Array, row: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """The `size` keys of a row from `key` on, [K, size, d]."""
    _, K, _, d = x_BKSd.shape
    return lax.dynamic_slice(x_BKSd, (row, 0, key, 0), (1, K, size, d))[0]


def _add(x_BKSd: jax.Array, part_KCd: jax.Array, row: jax.Array, key: jax.Array) -> jax.Array:
    part = part_KCd + _take(x_BKSd, row, key, part_KCd.shape[1])
    return lax.dynamic_update_slice(x_BKSd, part[None], (row, 0, key, 0))


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros behind the second axis, up to a multiple."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
