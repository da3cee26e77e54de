"""Attention over intervals, its implementations, and the projections around it.

Dimensions: B rows, L queries, S keys, D width, N query heads, K key/value heads, G = N / K, d channels.
"""

import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.kernels.chunked import xla_chunked
from neo_jax.kernels.dispatch import dispatch
from neo_jax.kernels.splash import splash
from neo_jax.kernels.triton import triton
from neo_jax.kernels.vendor import cudnn, mosaic
from neo_jax.model.coords import COORDS, Rotary, Segments, rotate
from neo_jax.model.linear import Linear
from neo_jax.model.mask import Intervals, dense
from neo_jax.model.norm import NORMS
from neo_jax.model.quantized import product
from neo_jax.model.route import Routing, apply, routed
from neo_jax.params import normal, zeros


def reference(
    q_BLNd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, intervals: Intervals, scale: float
) -> jax.Array:
    """Dense masked softmax attention; the definition every other implementation is tested against.

    Query and value channels may differ in number. Query head n reads key/value head n // G.
    Returns [B, L, N, d_v] in the dtype of v; the softmax is float32.
    """
    B, L, N, _ = q_BLNd.shape
    S, K = k_BSKd.shape[1:3]
    # One matrix product per row and key/value head: the queries of its G heads stand below each other.
    q = q_BLNd.reshape(B, L, K, N // K, -1).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * L, -1)
    k, v = k_BSKd.swapaxes(1, 2), v_BSKd.swapaxes(1, 2)
    logits = jnp.einsum("BKMd,BKSd->BKMS", q, k).astype(jnp.float32) * scale
    allowed = dense(intervals, S)[:, None, None]
    logits = jnp.where(allowed, logits.reshape(B, K, N // K, L, S), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(B, K, N // K * L, S)
    out = jnp.einsum("BKMS,BKSd->BKMd", weights, v)
    return out.reshape(B, K, N // K, L, -1).transpose(0, 3, 1, 2, 4).reshape(B, L, N, -1)


ATTENTION = {
    "reference": reference,
    "xla_chunked": xla_chunked,
    "splash": splash,
    "triton": triton,
    "cudnn": cudnn,
    "mosaic": mosaic,
}


class Cache(NamedTuple):
    """Keys and values of one layer (or, with a leading axis, of every layer) at S slots."""

    k: jax.Array  # [B, S, K, d_qk]
    v: jax.Array  # [B, S, K, d_v]

    def write(self, k_BLKd: jax.Array, v_BLKd: jax.Array, slots_BL: jax.Array) -> "Cache":
        """Puts new keys and values at each row's slots [B, L] int32."""
        rows = jnp.arange(slots_BL.shape[0])[:, None]
        return Cache(self.k.at[rows, slots_BL].set(k_BLKd), self.v.at[rows, slots_BL].set(v_BLKd))


class QKV(nnx.Module):
    """Projections to queries, keys and values, and the norms of queries and keys; no rotation.

    With coords "thw", `q_hw` and `k_hw` of the same width as `q` and `k` give the H and W channels beside the
    T channels (NEO section 4).
    """

    def __init__(self, config: ConfigDict):
        d, embed = config.head_dim, {"embed": config.hidden_size}
        matmul = product(config.quantization, config.reduce_dtype)
        queries = {"heads": config.num_heads, "head_dim": d}
        keys = {"kv_heads": config.num_kv_heads, "head_dim": d}

        def project(side: str, outputs: dict[str, int]) -> Linear:
            bias_init = zeros if side in config.attention_bias else None
            return Linear(embed, outputs, normal(config.init_std), bias_init, matmul)

        coords = COORDS[config.coords.kind](config.coords, d)
        self.q, self.k, self.v = project("q", queries), project("k", keys), project("v", keys)
        if coords.hw_norms:
            self.q_hw, self.k_hw = project("q", queries), project("k", keys)
        # (suffix of the projections, segments of their channels)
        sources = (("", coords.norms), ("_hw", coords.hw_norms))
        self.sources = tuple(source for source in sources if source[1])
        self.has_norms = config.qk_norm != "none"
        for _, segments in self.sources if self.has_norms else ():
            for suffix, size in segments:
                for side in "qk":
                    norm = NORMS[config.qk_norm](size, "head_dim", config.norm_eps)
                    setattr(self, f"{side}_norm{suffix}", norm)

    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, N, d_qk], keys [B, L, K, d_qk] and values [B, L, K, d]."""
        return self._side("q", x_BLD), self._side("k", x_BLD), self.v(x_BLD)

    def _side(self, side: str, x_BLD: jax.Array) -> jax.Array:
        channels: list[jax.Array] = []
        for suffix, segments in self.sources:
            x = getattr(self, side + suffix)(x_BLD)
            channels += self._normed(side, x, segments) if self.has_norms else [x]
        return channels[0] if len(channels) == 1 else jnp.concatenate(channels, axis=-1)

    def _normed(self, side: str, x: jax.Array, segments: Segments) -> list[jax.Array]:
        ends = list(itertools.accumulate(size for _, size in segments))
        parts = jnp.split(x, ends[:-1], axis=-1)
        return [
            getattr(self, f"{side}_norm{suffix}")(part)
            for (suffix, _), part in zip(segments, parts, strict=True)
        ]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions (coords.py) over intervals (mask.py).

    Scores are scaled by 1 / sqrt(head_dim), not by the widened query of coords "thw": a model whose H/W keys
    are zero is then exactly its text-only base.
    """

    def __init__(self, config: ConfigDict):
        def out() -> Linear:
            inputs = {"heads": config.num_heads, "head_dim": config.head_dim}
            bias_init = zeros if "o" in config.attention_bias else None
            matmul = product(config.quantization, config.reduce_dtype)
            return Linear(inputs, {"embed": config.hidden_size}, normal(config.init_std), bias_init, matmul)

        self.qkv = routed(config.route.attention, lambda: QKV(config))
        self.o = routed(config.route.attention, out)
        self.parts = COORDS[config.coords.kind](config.coords, config.head_dim).parts
        self.scale = config.head_dim**-0.5
        self.attend = dispatch(config.attention, ATTENTION)

    def project(
        self, x_BLD: jax.Array, table: Rotary, routing: Routing | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, N, d_qk] and keys [B, L, K, d_qk] after norm and rotation, values [B, L, K, d]."""
        q, k, v = apply(self.qkv, x_BLD, routing)
        return rotate(q, table, self.parts), rotate(k, table, self.parts), v

    def __call__(
        self,
        x_BLD: jax.Array,
        table: Rotary,
        intervals: Intervals,
        routing: Routing | None = None,
        cache: Cache | None = None,
        slots_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Attends inside the row, or, given a cache, over the cache after writing this row at `slots_BL`."""
        q, k, v = self.project(x_BLD, table, routing)
        chex.assert_equal_shape_prefix([q, k, v, intervals.end], 2)
        if cache is not None:
            cache = cache.write(k, v, slots_BL)
            k, v = cache
        return apply(self.o, self.attend(q, k, v, intervals, self.scale), routing), cache
