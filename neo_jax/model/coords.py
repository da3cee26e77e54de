"""Rotary position embeddings on the token coordinates (t, h, w).

A kind is a tuple of channel groups. Each group rotates `size` of a head's query/key channels by one
coordinate, with its own base:

    1d    T over head_dim channels
    thw   T over head_dim, plus H and W over head_dim / 2 extra channels each (NEO Native-RoPE, section 4)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


class Group(NamedTuple):
    """`size` channels of every query/key head rotated by coordinate `axis` (0 t, 1 h, 2 w)."""

    axis: int
    size: int
    theta: float


def one_d(coords: ConfigDict, head_dim: int) -> tuple[Group, ...]:
    return (Group(0, head_dim, coords.rope_theta),)


def thw(coords: ConfigDict, head_dim: int) -> tuple[Group, ...]:
    half = head_dim // 2
    return (
        Group(0, head_dim, coords.rope_theta),
        Group(1, half, coords.rope_theta_hw),
        Group(2, half, coords.rope_theta_hw),
    )


COORDS = {"1d": one_d, "thw": thw}


def frequencies(size: int, theta: float) -> jax.Array:
    """theta^(-2i / size) for i < size / 2, float32."""
    return theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


class Rotary(NamedTuple):
    """cos and sin, [B, L, channels / 2] float32, over the groups side by side."""

    cos: jax.Array
    sin: jax.Array


def rotary(groups: tuple[Group, ...], coords_BL3: jax.Array) -> Rotary:
    """Angles coordinate * theta^(-2i / size), i < size / 2, for every group, concatenated."""
    angles = jnp.concatenate(
        [coords_BL3[..., g.axis, None] * frequencies(g.size, g.theta)[None, None] for g in groups], axis=-1
    )
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BLNd: jax.Array, table: Rotary, groups: tuple[Group, ...]) -> jax.Array:
    """Rotates pairs (i, i + size / 2) inside each group ("half-split" convention).

    Args:
        x_BLNd: queries or keys, channels laid out group after group.
        table: from `rotary`, cast here to the dtype of x (the products are then in that dtype).
    """
    firsts, seconds, start = [], [], 0
    for group in groups:
        half = group.size // 2
        firsts.append(x_BLNd[..., start : start + half])
        seconds.append(x_BLNd[..., start + half : start + group.size])
        start += group.size
    cos, sin = (t[:, :, None, :].astype(x_BLNd.dtype) for t in table)
    first, second = jnp.concatenate(firsts, -1), jnp.concatenate(seconds, -1)
    rotated_first, rotated_second = first * cos - second * sin, second * cos + first * sin
    out, start = [], 0
    for group in groups:
        half = group.size // 2
        out += [rotated_first[..., start : start + half], rotated_second[..., start : start + half]]
        start += half
    return jnp.concatenate(out, axis=-1)
