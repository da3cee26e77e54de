"""Rotary position embeddings on the token coordinates (t, h, w).

A kind says which channels of a head exist, how they are normed, and which coordinate turns which of them:

    1d         t over the first rotary_fraction of the head
    v2pe       as 1d; its coordinates are fractions inside images (data_pipelines/positions.py)
    mrope      one table of frequencies over the head, cut into sections that follow t, h and w (Qwen2-VL)
    thw        t over the head, plus h and w over head_dim / 2 extra channels each (NEO Native-RoPE)
    thw_split  the head itself cut into t (half), h and w (a quarter each) (SenseNova-U1; spec neo.md 13)
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


class Part(NamedTuple):
    """`size` channels rotated in pairs (i, i + size / 2) by theta^(-2i / size) times a coordinate.

    `sections` lists (coordinate: 0 t, 1 h, 2 w; number of pairs that follow it), from i = 0 on.
    """

    size: int
    theta: float
    sections: tuple[tuple[int, int], ...]


Segments = tuple[tuple[str, int], ...]  # (suffix of the query/key norm, channels it covers), in channel order


class Coords(NamedTuple):
    """Channels of a query or key head: what `q` and `k` project to, then what `q_hw` and `k_hw` do."""

    parts: tuple[Part, ...]  # rotated from channel 0 on; channels beyond them stay as they are
    norms: Segments  # of what `q` and `k` project to
    hw_norms: Segments  # of what `q_hw` and `k_hw` project to; empty where these do not exist

    @property
    def qk_size(self) -> int:
        """Channels of a query/key head."""
        return sum(size for _, size in self.norms + self.hw_norms)


def one_d(config: ConfigDict, d: int) -> Coords:
    size = round(d * config.rotary_fraction)
    return Coords((_follow(0, size, config.rope_theta),), (("", d),), ())


def mrope(config: ConfigDict, d: int) -> Coords:
    sections = tuple((axis, pairs) for axis, pairs in enumerate(config.sections) if pairs)
    return Coords((Part(d, config.rope_theta, sections),), (("", d),), ())


def thw(config: ConfigDict, d: int) -> Coords:
    half = d // 2
    parts = (
        _follow(0, d, config.rope_theta),
        _follow(1, half, config.rope_theta_hw),
        _follow(2, half, config.rope_theta_hw),
    )
    return Coords(parts, (("", d),), (("_h", half), ("_w", half)))


def thw_split(config: ConfigDict, d: int) -> Coords:
    half, quarter = d // 2, d // 4
    parts = (
        _follow(0, half, config.rope_theta),
        _follow(1, quarter, config.rope_theta_hw),
        _follow(2, quarter, config.rope_theta_hw),
    )
    return Coords(parts, (("", half), ("_hw", half)), ())


COORDS = {"1d": one_d, "v2pe": one_d, "mrope": mrope, "thw": thw, "thw_split": thw_split}


def text_coords(kind: str, t: jax.Array) -> jax.Array:
    """(t, h, w) of text at t: [...] -> [..., 3]. M-RoPE moves all three, the others t alone."""
    zero = jnp.zeros_like(t)
    return jnp.stack([t, t, t] if kind == "mrope" else [t, zero, zero], axis=-1)


def t_behind(kind: str, coords_BL3: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """t [B] of the text that follows each row's first `lengths` tokens (data_pipelines/positions.py)."""
    if kind == "mrope":
        inside = jnp.arange(coords_BL3.shape[1])[None] < lengths_B[:, None]
        return jnp.where(inside, coords_BL3.max(axis=-1), 0.0).max(axis=1) + 1
    return jnp.ceil(coords_BL3[jnp.arange(len(lengths_B)), lengths_B - 1, 0]) + 1


def _follow(axis: int, size: int, theta: float) -> Part:
    return Part(size, theta, ((axis, size // 2),))


def frequencies(size: int, theta: float) -> jax.Array:
    """theta^(-2i / size) for i < size / 2, float32."""
    return theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


class Rotary(NamedTuple):
    """cos and sin, [B, L, pairs] float32, over the parts side by side."""

    cos: jax.Array
    sin: jax.Array


def rotary(parts: tuple[Part, ...], coords_BL3: jax.Array) -> Rotary:
    """Angles coordinate * frequency of every pair of every part, concatenated."""
    angles = []
    for part in parts:
        frequency, start = frequencies(part.size, part.theta), 0
        for axis, pairs in part.sections:
            angles.append(coords_BL3[..., axis, None] * frequency[None, None, start : start + pairs])
            start += pairs
    joined = jnp.concatenate(angles, axis=-1)
    return Rotary(jnp.cos(joined), jnp.sin(joined))


def rotate(x_BLNd: jax.Array, table: Rotary, parts: tuple[Part, ...]) -> jax.Array:
    """Rotates pairs (i, i + size / 2) inside each part ("half-split" convention).

    Args:
        x_BLNd: queries or keys, channels laid out part after part, then those that do not rotate.
        table: from `rotary`, cast here to the dtype of x (the products are then in that dtype).
    """
    halves = [part.size // 2 for part in parts]
    # Gradients of splits are put side by side; those of slices would be padded to all channels and added.
    *channels, rest = _split(x_BLNd, [half for half in halves for _ in range(2)])
    cos, sin = (t[:, :, None, :].astype(x_BLNd.dtype) for t in table)
    first, second = jnp.concatenate(channels[::2], -1), jnp.concatenate(channels[1::2], -1)
    rotated = _split(first * cos - second * sin, halves[:-1]), _split(second * cos + first * sin, halves[:-1])
    out = itertools.chain.from_iterable(zip(*rotated, strict=True))
    return jnp.concatenate([*out, rest], axis=-1)


def _split(x: jax.Array, sizes: Sequence[int]) -> Sequence[jax.Array]:
    """Pieces of these sizes along the last dimension, and what is left."""
    return jnp.split(x, list(itertools.accumulate(sizes)), axis=-1)
