"""Attention masks as intervals.

Documents and images are contiguous in a row, so query i attends the keys kv_start[i] <= j < kv_end[i]:
kv_start is the start of its document; kv_end is i + 1, or the end of its image where images see themselves
both ways (NEO section 6; DESIGN section 1). Two int32 vectors replace the dense [L, L] mask.

    <img>  p  p  </img>  a        causal       image_bidirectional
      0    1  2    3     4       kv_end 1 2 3 4 5       1 3 3 4 5

A kind maps a batch (the token table) to its Intervals.
"""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

Batch = Mapping[str, jax.Array]


class Intervals(NamedTuple):
    """Keys each query may attend: start inclusive, end exclusive, both [B, L] int32."""

    start: jax.Array
    end: jax.Array


def causal(batch: Batch) -> Intervals:
    """Every token sees its own document up to itself."""
    segment_ids = batch["segment_ids"]
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[-1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.where(_changes(segment_ids), index, 0)
    return Intervals(jax.lax.cummax(starts, axis=1), index + 1)


def image_bidirectional(batch: Batch) -> Intervals:
    """Causal, and tokens of one image (image_ids > 0) also see that image to its end."""
    chex.assert_equal_shape([batch["segment_ids"], batch["image_ids"]])
    return _both_ways(causal(batch), batch["image_ids"])


def prefix(batch: Batch) -> Intervals:
    """Prefix language model: what stands before a document's first prediction sees itself both ways.

    The prefix ends with the position that predicts the first supervised token (loss weight > 0); a document
    without one, such as a prompt, is all prefix (Raffel et al., 2020; PaliGemma).
    """
    start, end = causal(batch)
    supervised = (batch["loss_weights"] > 0).astype(jnp.int32)
    before = jnp.cumsum(supervised, axis=1) - supervised
    in_prefix = before == jnp.take_along_axis(before, start, axis=1)
    return _both_ways(Intervals(start, end), jnp.where(in_prefix, batch["segment_ids"], 0))


MASKS = {"causal": causal, "image_bidirectional": image_bidirectional, "prefix": prefix}


def slide(intervals: Intervals, positions: jax.Array, window: int) -> Intervals:
    """The intervals cut to the `window` keys before each query, and itself; window 0 cuts nothing.

    `positions` [B, L] are the queries' own key indices. Mistral's window w shows w + 1 keys (SOLO 1.5).
    """
    if not window:
        return intervals
    return Intervals(jnp.maximum(intervals.start, positions - window), intervals.end)


def dense(intervals: Intervals, num_keys: int) -> jax.Array:
    """The boolean mask [B, L, S] that the intervals stand for; for tests, pictures and `reference`."""
    keys = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
    return (intervals.start[..., None] <= keys) & (keys < intervals.end[..., None])


def _both_ways(intervals: Intervals, group_ids: jax.Array) -> Intervals:
    """Lets each token of a contiguous group (ids > 0) see its group to the end."""
    # The end of the run of equal ids, found as a running minimum from the right.
    length = group_ids.shape[-1]
    last_of_run = jnp.roll(_changes(group_ids), -1, axis=1).at[:, -1].set(True)
    run_end = jax.lax.cummin(jnp.where(last_of_run, intervals.end, length), axis=1, reverse=True)
    return Intervals(intervals.start, jnp.where(group_ids > 0, run_end, intervals.end))


def _changes(ids: jax.Array) -> jax.Array:
    """True where a value differs from its left neighbour; True at position 0."""
    return jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
