"""Attention over intervals on GPUs: flash attention in Pallas' Triton dialect that skips what nobody attends.

Forward and both parts of backward visit live blocks only. A block of queries visits the key blocks from the
least start to the greatest end of its intervals; a block of keys visits the query blocks between the first
and the last that reach it, known from the same two vectors. No [L, L] array exists anywhere (Dao, 2023).
Ready-made kernels (vendor.py): cuDNN's take a dense mask, Tokamax's skip in forward but not in backward.

Dimensions: as in chunked.py, Q and C queries and keys of a block.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as gpu

from neo_jax.model.mask import Intervals

_MASKED = -1e30  # below every score, and finite: a difference of two of them is not NaN
_LOG2_E = math.log2(math.e)  # GPUs have an instruction for 2^x, not for e^x


class Tile(NamedTuple):
    """How a kernel is cut: queries and keys of a block, warps that share it, loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """One for each kernel: out; the gradient of queries; those of keys and values."""

    forward: Tile
    queries: Tile
    keys: Tile


# Of 16-bit numbers, by the greater number of channels: the fastest of eight or so tried for each on an H200.
_WIDE = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2))
_NARROW = Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
# Of 32 bits, which are exact and slow: products of small tiles fit the shared memory.
_FLOAT32 = Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))


def triton(
    q_BLNd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    intervals: Intervals,
    scale: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The same function as `reference`: [B, L, N, d_v] in the dtype of v, softmax in float32.

    Query and value channels may differ in number; query head n reads key/value head n // G. A query with an
    empty interval gives zeros. `tiles` None = as suits dtype and channels; `interpret` runs the kernels on a
    CPU, for tests.
    """
    B, L = q_BLNd.shape[:2]
    chex.assert_shape([intervals.start, intervals.end], (B, L))
    chex.assert_equal_shape_prefix([k_BSKd, v_BSKd], 3)
    tiles = tiles or _tiles(q_BLNd, v_BSKd)
    queries = math.lcm(*(tile.queries for tile in tiles))
    keys = math.lcm(*(tile.keys for tile in tiles))
    q, k, v = (
        _pad(x, size, channels=True) for x, size in ((q_BLNd, queries), (k_BSKd, keys), (v_BSKd, keys))
    )
    # Padding queries repeat the last one, so that they make their block visit nothing more.
    start, end = (_pad(x, queries, mode="edge") for x in intervals)
    out = _attend(q, k, v, Intervals(start, end), scale, tiles, interpret)
    return out[:, :L, :, : v_BSKd.shape[-1]]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    intervals: Intervals,
    scale: float,
    tiles: Tiles,
    interpret: bool,
) -> jax.Array:
    return _attend_fwd(q, k, v, intervals, scale, tiles, interpret)[0]


def _attend_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    intervals: Intervals,
    scale: float,
    tiles: Tiles,
    interpret: bool,
) -> tuple[jax.Array, tuple]:
    B, L, N, d = q.shape
    S, K, d_v = v.shape[1:]
    tile, call = tiles.forward, partial(_call, interpret=interpret)
    queries, rows = _by_head(tile.queries), pl.BlockSpec((None, tile.queries), lambda b, n, i: (b, i))
    out, log_total = call(
        partial(_forward_kernel, scale=scale, size=tile.keys),
        name="attention_forward",
        tile=tile,
        grid=(B, N, L // tile.queries),
        in_specs=[queries(d), _whole(S, d, N // K), _whole(S, d_v, N // K), rows, rows],
        out_specs=[queries(d_v), _log_spec(tile.queries)],
        out_shape=[
            jax.ShapeDtypeStruct((B, L, N, d_v), v.dtype),
            jax.ShapeDtypeStruct((B, N, L), jnp.float32),
        ],
    )(q, k, v, *intervals)
    return out, (q, k, v, intervals, out, log_total)


def _attend_bwd(scale: float, tiles: Tiles, interpret: bool, saved: tuple, d_out: jax.Array) -> tuple:
    q, k, v, intervals, out, log_total = saved
    B, L, N, d = q.shape
    S, K, d_v = v.shape[1:]
    G = N // K
    call = partial(_call, interpret=interpret)
    delta = jnp.einsum("BLNd,BLNd->BNL", out, d_out, preferred_element_type=jnp.float32)

    tile = tiles.queries
    queries, rows = _by_head(tile.queries), pl.BlockSpec((None, tile.queries), lambda b, n, i: (b, i))
    (d_q,) = call(
        partial(_queries_kernel, scale=scale, size=tile.keys),
        name="attention_backward_queries",
        tile=tile,
        grid=(B, N, L // tile.queries),
        in_specs=[
            *(queries(d), _whole(S, d, G), _whole(S, d_v, G), rows, rows),
            *(queries(d_v), _log_spec(tile.queries), _log_spec(tile.queries)),
        ],
        out_specs=[queries(d)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
    )(q, k, v, *intervals, d_out, log_total, delta)

    tile = tiles.keys
    keys = _by_head(tile.keys)
    group, row = pl.BlockSpec((None, L, G, d), lambda b, h, i: (b, 0, h, 0)), (None, G, L)
    group_v = pl.BlockSpec((None, L, G, d_v), lambda b, h, i: (b, 0, h, 0))
    logs, whole = (
        pl.BlockSpec(row, lambda b, h, i: (b, h, 0)),
        pl.BlockSpec((None, L), lambda b, h, i: (b, 0)),
    )
    bound = pl.BlockSpec((None, None), lambda b, h, i: (b, i))
    d_k, d_v_ = call(
        partial(_keys_kernel, scale=scale, size=tile.queries),
        name="attention_backward_keys",
        tile=tile,
        grid=(B, K, S // tile.keys),
        in_specs=[group, keys(d), keys(d_v), whole, whole, group_v, logs, logs, bound, bound],
        out_specs=[keys(d), keys(d_v)],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    )(q, k, v, *intervals, d_out, log_total, delta, *_reached_by(intervals, tile, S))
    return d_q, d_k, d_v_, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, out_ref: Any, log_ref: Any,
    *, scale: float, size: int,
) -> None:  # fmt: skip
    """One block of queries of one head, over its live key blocks of `size`: result, log2 of normalisers."""
    q, start, end = q_ref[...], start_ref[...], end_ref[...]

    def visit(index: jax.Array, carry: tuple) -> tuple:
        greatest, total, out = carry
        keys = pl.ds(index * size, size)
        scores = _scores(q, k_ref[keys, :], start, end, index * size, scale)
        grown = jnp.maximum(greatest, scores.max(axis=1))
        weights, kept = jnp.exp2(scores - grown[:, None]), jnp.exp2(greatest - grown)
        part = _product(weights.astype(v_ref.dtype), v_ref[keys, :])
        return grown, total * kept + weights.sum(axis=1), out * kept[:, None] + part

    Q = q.shape[0]
    empty = jnp.full((Q,), _MASKED / 2), jnp.zeros((Q,)), jnp.zeros((Q, v_ref.shape[1]))
    greatest, total, out = lax.fori_loop(*_visited(start, end, size), visit, empty)
    total = jnp.where(total > 0, total, 1.0)  # queries that attend nothing
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_ref[...] = greatest + jnp.log2(total)


def _queries_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, d_out_ref: Any, log_ref: Any,
    delta_ref: Any, d_q_ref: Any, *, scale: float, size: int,
) -> None:  # fmt: skip
    """The gradient of one block of queries of one head, over its live key blocks of `size`."""
    q, start, end, d_out = q_ref[...], start_ref[...], end_ref[...], d_out_ref[...]
    log_total, delta = log_ref[...], delta_ref[...]

    def visit(index: jax.Array, d_q: jax.Array) -> jax.Array:
        keys = pl.ds(index * size, size)
        k = k_ref[keys, :]
        weights = jnp.exp2(_scores(q, k, start, end, index * size, scale) - log_total[:, None])
        d_scores = weights * (_product(d_out, v_ref[keys, :].T) - delta[:, None]) * scale
        return d_q + _product(d_scores.astype(k.dtype), k)

    d_q = lax.fori_loop(*_visited(start, end, size), visit, jnp.zeros(q.shape))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _keys_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, d_out_ref: Any, log_ref: Any,
    delta_ref: Any, first_ref: Any, stop_ref: Any, d_k_ref: Any, d_v_ref: Any, *, scale: float, size: int,
) -> None:  # fmt: skip
    """The gradients of one block of keys and values, over the query blocks of `size` that read it."""
    k, v, first = k_ref[...], v_ref[...], first_ref[...]
    base, blocks = pl.program_id(2) * k.shape[0], jnp.maximum(stop_ref[...] - first, 0)

    def visit(step: jax.Array, carry: tuple) -> tuple:
        d_k, d_v = carry
        head, block = lax.div(step, blocks), first + lax.rem(step, blocks)
        queries = pl.ds(block * size, size)
        q, d_out = q_ref[queries, head, :], d_out_ref[queries, head, :]
        scores = _scores(q, k, start_ref[queries], end_ref[queries], base, scale)
        weights = jnp.exp2(scores - log_ref[head, queries][:, None])
        d_v += _product(weights.astype(d_out.dtype).T, d_out)
        d_scores = weights * (_product(d_out, v.T) - delta_ref[head, queries][:, None]) * scale
        return d_k + _product(d_scores.astype(q.dtype).T, q), d_v

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    d_k, d_v = lax.fori_loop(0, q_ref.shape[1] * blocks, visit, zeros)
    d_k_ref[...], d_v_ref[...] = d_k.astype(d_k_ref.dtype), d_v.astype(d_v_ref.dtype)


def _scores(
    q_Qd: jax.Array, k_Cd: jax.Array, start_Q: jax.Array, end_Q: jax.Array, base: jax.Array, scale: float
) -> jax.Array:
    """Scores [Q, C] float32 of keys from `base` on, as powers of two, `_MASKED` outside the intervals."""
    keys = (base + jnp.arange(k_Cd.shape[0], dtype=jnp.int32))[None]
    allowed = (start_Q[:, None] <= keys) & (keys < end_Q[:, None])
    return jnp.where(allowed, _product(q_Qd, k_Cd.T) * (scale * _LOG2_E), _MASKED)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Float32 sums; of float32 numbers exactly, not in TF32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _visited(start: jax.Array, end: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The key blocks of `size` from the first, up to but without the second, hold all that queries attend.

    Both have the shape of `start` without its last axis. Where nothing is attended the range is empty.
    """
    live = end > start
    first = jnp.where(live, start, jnp.iinfo(jnp.int32).max).min(axis=-1)
    last = jnp.where(live, end, 0).max(axis=-1)
    return lax.div(first, size), lax.div(last + size - 1, size)


def _reached_by(intervals: Intervals, tile: Tile, num_keys: int) -> tuple[jax.Array, jax.Array]:
    """The query blocks that attend each key block, as first and one past the last: [B, S / C] int32 each."""
    start, end = (x.reshape(x.shape[0], -1, tile.queries) for x in intervals)
    first, stop = (x[..., None] for x in _visited(start, end, tile.keys))
    blocks = jnp.arange(num_keys // tile.keys, dtype=jnp.int32)[None, None]
    live = (first <= blocks) & (blocks < stop)  # [B, L / Q, S / C]
    num, any_live = live.shape[1], live.any(axis=1)
    last = num - jnp.argmax(live[:, ::-1], axis=1)
    return jnp.argmax(live, axis=1).astype(jnp.int32), jnp.where(any_live, last, 0).astype(jnp.int32)


def _tiles(q: jax.Array, v: jax.Array) -> Tiles:
    if q.dtype.itemsize == 4:
        return _FLOAT32
    return _WIDE if max(q.shape[-1], v.shape[-1]) > 128 else _NARROW


def _call(kernel: Callable, tile: Tile, interpret: bool, **kwargs: Any) -> Callable:
    params = gpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(kernel, compiler_params=params, interpret=interpret, **kwargs)


def _by_head(size: int) -> Callable[[int], pl.BlockSpec]:
    """Block i of `size` positions of head n."""
    return lambda channels: pl.BlockSpec((None, size, None, channels), lambda b, n, i: (b, i, n, 0))


def _whole(length: int, channels: int, group: int) -> pl.BlockSpec:
    """All keys, or values, that query head n reads."""
    return pl.BlockSpec((None, length, None, channels), lambda b, n, i: (b, 0, n // group, 0))


def _log_spec(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, size), lambda b, n, i: (b, n, i))


def _pad(x: jax.Array, multiple: int, channels: bool = False, **how: Any) -> jax.Array:
    """Pads the second axis to a multiple; `channels` to a power of two, at least 16, as tiles are."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % multiple)
    if channels:
        widths[-1] = (0, max(16, pl.next_power_of_2(x.shape[-1])) - x.shape[-1])
    return jnp.pad(x, widths, **how)
