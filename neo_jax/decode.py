"""Inference with a key/value cache: score candidate texts after a prompt, and continue a prompt greedily.

Pure functions, to be jitted. Dimensions: B rows of one prompt each, L prompt positions, C candidates,
T tokens of a candidate, V vocabulary.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from neo_jax.model.coords import t_behind, text_coords
from neo_jax.model.mask import Batch
from neo_jax.model.transformer import Caches, Transformer


class Prefix(NamedTuple):
    """Prompts that have been read."""

    logits: jax.Array  # [B, V] float32, of the token that follows the prompt
    lengths: jax.Array  # [B] int32, tokens of the prompt, which is the cache slot of the next one
    t: jax.Array  # [B] float32, coordinate t of the next token
    caches: Caches  # L slots


def read_prompts(model: Transformer, batch: Batch) -> Prefix:
    """Reads rows that hold one prompt each, from position 0; the prompts may differ in length."""
    B, L = batch["tokens"].shape
    hidden_BLD, caches = model.prefill(batch, L)
    lengths = (batch["segment_ids"] > 0).sum(axis=1, dtype=jnp.int32)
    rows, last = jnp.arange(B), lengths - 1
    t = t_behind(model.coords_kind, batch["coords"], lengths)
    return Prefix(model.logits(hidden_BLD[rows, last]), lengths, t, caches)


def score_candidates(
    model: Transformer, prefix: Prefix, tokens_CT: jax.Array, lengths_C: jax.Array
) -> jax.Array:
    """log p(candidate | prompt) of every candidate after every prompt, [B, C] float32.

    Args:
        model: a bound model.
        prefix: the prompts.
        tokens_CT: int32; candidate c is its first lengths_C[c] tokens, what follows may be anything.
        lengths_C: int32, at least 1.
    """
    chex.assert_equal_shape_prefix([tokens_CT, lengths_C], 1)
    B, (C, T) = prefix.lengths.shape[0], tokens_CT.shape
    first_BC = jax.nn.log_softmax(prefix.logits)[:, tokens_CT[:, 0]]
    if T == 1:
        return first_BC
    # Row b * C + c continues prompt b with candidate c. A candidate's last token is predicted but never read.
    caches = jax.tree.map(lambda x: jnp.repeat(_with_room(x, T - 1), C, axis=1), prefix.caches)
    lengths, t = jnp.repeat(prefix.lengths, C), jnp.repeat(prefix.t, C)
    hidden, _ = _extend(model, jnp.tile(tokens_CT[:, :-1], (B, 1)), lengths, t, caches)
    logits = model.logits(hidden)
    targets = jnp.tile(tokens_CT[:, 1:], (B, 1))[..., None]
    picked = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    log_p_BCT = (picked - jax.nn.logsumexp(logits, axis=-1)).reshape(B, C, T - 1)
    counted_CT = jnp.arange(1, T)[None] < lengths_C[:, None]
    return first_BC + jnp.where(counted_CT[None], log_p_BCT, 0.0).sum(axis=-1)


def greedy(model: Transformer, prefix: Prefix, stop_id: int, max_new_tokens: int) -> jax.Array:
    """Appends the likeliest token, again and again, until every row has ended or is full.

    Returns int32 [B, max_new_tokens]; `stop_id` ends a text and fills the rest of its row.
    """
    B = prefix.lengths.shape[0]

    class State(NamedTuple):
        step: jax.Array
        logits: jax.Array  # [B, V], of the token to choose
        caches: Caches
        tokens: jax.Array  # [B, max_new_tokens]
        ended: jax.Array  # [B] bool

    def choose_and_read(state: State) -> State:
        token = jnp.where(state.ended, stop_id, jnp.argmax(state.logits, axis=-1).astype(jnp.int32))
        lengths, t = prefix.lengths + state.step, prefix.t + state.step
        hidden, caches = _extend(model, token[:, None], lengths, t, state.caches)
        return State(
            step=state.step + 1,
            logits=model.logits(hidden[:, 0]),
            caches=caches,
            tokens=state.tokens.at[:, state.step].set(token),
            ended=state.ended | (token == stop_id),
        )

    start = State(
        step=jnp.zeros((), jnp.int32),
        logits=prefix.logits,
        caches=jax.tree.map(lambda x: _with_room(x, max_new_tokens), prefix.caches),
        tokens=jnp.full((B, max_new_tokens), stop_id, jnp.int32),
        ended=jnp.zeros(B, bool),
    )
    return jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & ~state.ended.all(), choose_and_read, start
    ).tokens


def _with_room(cache: jax.Array, num_slots: int) -> jax.Array:
    """A cache array [layers, B, S, ...] with slots for more tokens."""
    return jnp.pad(cache, [(0, 0), (0, 0), (0, num_slots)] + [(0, 0)] * (cache.ndim - 3))


def _extend(
    model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, t_B: jax.Array, caches: Caches
) -> tuple[jax.Array, Caches]:
    """Reads T text tokens per row, the first at slot lengths_B and coordinate t_B."""
    steps_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    t_BT = t_B[:, None] + steps_T.astype(jnp.float32)
    coords_BT3 = text_coords(model.coords_kind, t_BT)
    return model.extend(tokens_BT, coords_BT3, lengths_B[:, None] + steps_T, caches)
