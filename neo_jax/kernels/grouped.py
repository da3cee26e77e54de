"""Products of sorted rows with one of several matrices each: what a mixture of experts is made of.

`jax.lax.ragged_dot` is the definition. For TPUs XLA compiles it to a kernel that multiplies each row once;
elsewhere it multiplies every row with every matrix and masks the results. There a loop over tiles takes its
place: a tile is the part of one group that lies in one block of rows, and there is a limit to their number.

Dimensions: S rows, sorted by group, G groups (experts), K and N inputs and outputs, R rows of a block.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from neo_jax import mesh as mesh_lib

# A remat policy must know the results by name: that they are products it sees only on TPUs.
CHECKPOINT_NAME = "grouped_product"
MAX_BLOCK = 512


def grouped(x_SK: Array, w_GKN: Array, sizes_G: Array) -> Array:
    """y[s] = x[s] @ w[g] for the rows s of group g, [S, N] in the dtype of x.

    Args:
        x_SK: rows sorted by group.
        w_GKN: a matrix for each group. Products are of the dtype of x, its gradient of its own.
        sizes_G: int32, rows of each group; their sum is S.
    """
    chex.assert_equal(x_SK.shape[1], w_GKN.shape[1])
    product = ragged if mesh_lib.platform() == "tpu" else tiled
    return checkpoint_name(product(x_SK, w_GKN, sizes_G), CHECKPOINT_NAME)


@jax.custom_vjp
def ragged(x_SK: Array, w_GKN: Array, sizes_G: Array) -> Array:
    """`grouped` by jax.lax.ragged_dot, whose own gradient of w has the dtype of the product."""
    return lax.ragged_dot(x_SK, w_GKN.astype(x_SK.dtype), sizes_G)


def _ragged_backward(kept: tuple[Array, Array, Array], g_SN: Array) -> tuple[Array, Array, None]:
    x_SK, w_GKN, sizes_G = kept
    rows_contracted = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    dw_GKN = lax.ragged_dot_general(x_SK, g_SN, sizes_G, rows_contracted, preferred_element_type=w_GKN.dtype)
    return lax.ragged_dot(g_SN, w_GKN.astype(g_SN.dtype).swapaxes(1, 2), sizes_G), dw_GKN, None


ragged.defvjp(lambda *args: (ragged(*args), args), _ragged_backward)


def tiled(x_SK: Array, w_GKN: Array, sizes_G: Array, block: int | None = None) -> Array:
    """`grouped` on any device, in blocks of R = `block` rows (None: `block_size`)."""
    S, G = x_SK.shape[0], len(sizes_G)
    R = block or block_size(S, G)
    padded = jnp.pad(x_SK, ((0, -S % R), (0, 0)))
    return _product(padded, w_GKN, _tiles(sizes_G, padded.shape[0] // R, R))[:S]


def block_size(S: int, G: int) -> int:
    """A power of two: the G - 1 blocks that are visited once more for another group add an eighth at most."""
    return min(MAX_BLOCK, 1 << max(3, (S // (8 * G)).bit_length() - 1))


class _Tiles(NamedTuple):
    """The parts of groups in blocks, and at the end as many empty ones as are left of S / R + G - 1."""

    block: Array  # int32, where it lies
    group: Array  # int32, whose rows these are
    rows: Array  # [tiles, R] bool, which of the block's


def _tiles(sizes_G: Array, num_blocks: int, R: int) -> _Tiles:
    end = jnp.cumsum(sizes_G)
    start = end - sizes_G
    first = start // R
    blocks = jnp.where(sizes_G > 0, (end - 1) // R - first + 1, 0)  # of each group
    last_tile = jnp.cumsum(blocks)
    tile = jnp.arange(num_blocks + len(sizes_G) - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right"), len(sizes_G) - 1)
    block = jnp.minimum(first[group] + tile - (last_tile - blocks)[group], num_blocks - 1)
    row = block[:, None] * R + jnp.arange(R, dtype=jnp.int32)[None]
    rows = (row >= start[group][:, None]) & (row < end[group][:, None])
    return _Tiles(block, group.astype(jnp.int32), rows & (tile < last_tile[-1])[:, None])


@jax.custom_vjp
def _product(x_SK: Array, w_GKN: Array, tiles: _Tiles) -> Array:
    """x and the result in whole blocks of rows."""
    return _each_tile(x_SK, w_GKN.astype(x_SK.dtype), tiles)


def _forward(x_SK: Array, w_GKN: Array, tiles: _Tiles) -> tuple[Array, tuple[Array, Array, _Tiles]]:
    return _product(x_SK, w_GKN, tiles), (x_SK, w_GKN, tiles)


def _backward(kept: tuple[Array, Array, _Tiles], g_SN: Array) -> tuple[Array, Array, None]:
    x_SK, w_GKN, tiles = kept

    def add(dw_GKN: Array, tile: _Tiles) -> tuple[Array, None]:
        dw_KN = jnp.matmul(_rows(x_SK, tile).T, _rows(g_SN, tile), preferred_element_type=jnp.float32)
        return dw_GKN.at[tile.group].add(dw_KN), None

    dw_GKN, _ = lax.scan(add, jnp.zeros(w_GKN.shape, jnp.float32), tiles)
    return _each_tile(g_SN, w_GKN.astype(g_SN.dtype).swapaxes(1, 2), tiles), dw_GKN.astype(w_GKN.dtype), None


_product.defvjp(_forward, _backward)


def _each_tile(x_SK: Array, w_GKN: Array, tiles: _Tiles) -> Array:
    """Adds each tile's product to its block: groups may share a block, but no row."""
    R = tiles.rows.shape[1]

    def add(y_SN: Array, tile: _Tiles) -> tuple[Array, None]:
        start = tile.block * R
        y_RN = lax.dynamic_slice_in_dim(y_SN, start, R) + _rows(x_SK, tile) @ w_GKN[tile.group]
        return lax.dynamic_update_slice_in_dim(y_SN, y_RN, start, axis=0), None

    return lax.scan(add, jnp.zeros((x_SK.shape[0], w_GKN.shape[2]), x_SK.dtype), tiles)[0]


def _rows(x_SK: Array, tile: _Tiles) -> Array:
    """The tile's rows of its block; the others are zero."""
    R = tile.rows.shape[0]
    return jnp.where(tile.rows[:, None], lax.dynamic_slice_in_dim(x_SK, tile.block * R, R), 0)
