"""Attention over intervals, its implementations, and the projections around it.

Dimensions: B rows, L queries, S keys, D width, N query heads, K key/value heads, G = N / K, d channels.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.model.coords import COORDS, Rotary, rotate
from neo_jax.model.linear import linear
from neo_jax.model.mask import Intervals, dense
from neo_jax.model.norm import RMSNorm
from neo_jax.params import normal, parameter


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


ATTENTION = {"reference": reference}


class Cache(NamedTuple):
    """Keys and values of one layer (or, with a leading axis, of every layer) at S slots."""

    k: jax.Array  # [B, S, K, d_qk]
    v: jax.Array  # [B, S, K, d_v]

    def write(self, k_BLKd: jax.Array, v_BLKd: jax.Array, slots_BL: jax.Array) -> "Cache":
        """Puts new keys and values at each row's slots [B, L] int32."""
        rows = jnp.arange(slots_BL.shape[0])[:, None]
        return Cache(self.k.at[rows, slots_BL].set(k_BLKd), self.v.at[rows, slots_BL].set(v_BLKd))


class Attention(nnx.Module):
    """Grouped-query attention with normed queries and keys and the rotary groups of `coords`.

    With coords "thw", a second projection of the same width gives H and W channels beside the T channels
    (NEO section 4). Scores are scaled by 1 / sqrt(head_dim), not by the widened query: a model whose H/W
    keys are zero is then exactly its text-only base.
    """

    def __init__(self, config: ConfigDict):
        D, N, K, d = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        matrix = normal(config.init_std)
        self.q = parameter((D, N, d), ("embed", "heads", "head_dim"), matrix)
        self.k = parameter((D, K, d), ("embed", "kv_heads", "head_dim"), matrix)
        self.v = parameter((D, K, d), ("embed", "kv_heads", "head_dim"), matrix)
        self.o = parameter((N, d, D), ("heads", "head_dim", "embed"), matrix)
        self.q_norm = RMSNorm(d, "head_dim", config.norm_eps)
        self.k_norm = RMSNorm(d, "head_dim", config.norm_eps)
        self.groups = COORDS[config.coords.kind](config.coords, d)
        self.has_hw = len(self.groups) > 1
        if self.has_hw:
            self.q_hw = parameter((D, N, d), ("embed", "heads", "head_dim"), matrix)
            self.k_hw = parameter((D, K, d), ("embed", "kv_heads", "head_dim"), matrix)
            self.q_norm_h = RMSNorm(d // 2, "head_dim", config.norm_eps)
            self.q_norm_w = RMSNorm(d // 2, "head_dim", config.norm_eps)
            self.k_norm_h = RMSNorm(d // 2, "head_dim", config.norm_eps)
            self.k_norm_w = RMSNorm(d // 2, "head_dim", config.norm_eps)
        self.scale = d**-0.5
        self.attend = ATTENTION[config.attention]

    def project(self, x_BLD: jax.Array, table: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, N, d_qk] and keys [B, L, K, d_qk] after norm and rotation, values [B, L, K, d]."""
        q, k = self.q_norm(linear(x_BLD, self.q[...])), self.k_norm(linear(x_BLD, self.k[...]))
        if self.has_hw:
            q_h, q_w = jnp.split(linear(x_BLD, self.q_hw[...]), 2, axis=-1)
            k_h, k_w = jnp.split(linear(x_BLD, self.k_hw[...]), 2, axis=-1)
            q = jnp.concatenate([q, self.q_norm_h(q_h), self.q_norm_w(q_w)], axis=-1)
            k = jnp.concatenate([k, self.k_norm_h(k_h), self.k_norm_w(k_w)], axis=-1)
        return rotate(q, table, self.groups), rotate(k, table, self.groups), linear(x_BLD, self.v[...])

    def __call__(
        self,
        x_BLD: jax.Array,
        table: Rotary,
        intervals: Intervals,
        cache: Cache | None = None,
        slots_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Attends inside the row, or, given a cache, over the cache after writing this row at `slots_BL`."""
        q, k, v = self.project(x_BLD, table)
        chex.assert_equal_shape_prefix([q, k, v, intervals.end], 2)
        if cache is not None:
            cache = cache.write(k, v, slots_BL)
            k, v = cache
        out = self.attend(q, k, v, intervals, self.scale)
        return linear(out, self.o[...], num_inputs=2), cache
