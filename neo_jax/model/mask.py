"""Attention masks as intervals.

Documents and images are contiguous in a row, so query i attends the keys kv_start[i] <= j < kv_end[i]:
kv_start is the start of its document; kv_end is i + 1, or the end of its image where images see themselves
both ways (NEO section 6; DESIGN section 1). Two int32 vectors replace the dense [L, L] mask.

    <img>  p  p  </img>  a        causal       image_bidirectional
      0    1  2    3     4       kv_end 1 2 3 4 5       1 3 3 4 5
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Intervals(NamedTuple):
    """Keys each query may attend: start inclusive, end exclusive, both [B, L] int32."""

    start: jax.Array
    end: jax.Array


def causal(segment_ids: jax.Array, image_ids: jax.Array) -> Intervals:
    """Every token sees its own document up to itself. Inputs and outputs [B, L] int32."""
    chex.assert_equal_shape([segment_ids, image_ids])
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[-1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.where(_changes(segment_ids), index, 0)
    return Intervals(jax.lax.cummax(starts, axis=1), index + 1)


def image_bidirectional(segment_ids: jax.Array, image_ids: jax.Array) -> Intervals:
    """Causal, and tokens of one image (image_ids > 0) also see that image to its end."""
    start, end = causal(segment_ids, image_ids)
    # The end of the run of equal image ids, found as a running minimum from the right.
    length = image_ids.shape[-1]
    last_of_run = jnp.roll(_changes(image_ids), -1, axis=1).at[:, -1].set(True)
    run_end = jax.lax.cummin(jnp.where(last_of_run, end, length), axis=1, reverse=True)
    return Intervals(start, jnp.where(image_ids > 0, run_end, end))


MASKS = {"causal": causal, "image_bidirectional": image_bidirectional}


def dense(intervals: Intervals, num_keys: int) -> jax.Array:
    """The boolean mask [B, L, S] that the intervals stand for; for tests, pictures and `reference`."""
    keys = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
    return (intervals.start[..., None] <= keys) & (keys < intervals.end[..., None])


def _changes(ids: jax.Array) -> jax.Array:
    """True where a value differs from its left neighbour; True at position 0."""
    return jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
