"""What patch embeddings share: pixels of image tokens, places inside them, vectors put into the row.

Dimensions: P image tokens of m * m patches of p x p pixels, L positions, D channels.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from data_pipelines import schema
from neo_jax.model.linear import on_last
from neo_jax.model.mask import Batch
from neo_jax.params import normal, parameter


@dataclasses.dataclass(frozen=True)
class Pixels:
    """uint8 squares (row-major y, x, rgb) -> normalised float32 rows, one per patch of p x p pixels."""

    patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, embed: ConfigDict) -> "Pixels":
        return cls(embed.patch_size, embed.merge_size, tuple(embed.pixel_mean), tuple(embed.pixel_std))

    @property
    def size(self) -> int:
        """Numbers in one patch."""
        return 3 * self.patch_size**2

    def __call__(self, patches_BPX: jax.Array) -> jax.Array:
        """[B, P, (p * m)^2 * 3] -> [B, P, m * m, p * p * 3]; the m x m patches of a square row by row."""
        p, m = self.patch_size, self.merge_size
        chex.assert_axis_dimension(patches_BPX, -1, (p * m) ** 2 * 3)
        x = patches_BPX.reshape(*patches_BPX.shape[:2], m, p, m, p, 3)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6)
        x = x.astype(jnp.float32) / 255
        x = (x - on_last(jnp.asarray(self.mean), x)) / on_last(jnp.asarray(self.std), x)
        return x.reshape(*patches_BPX.shape[:2], m * m, self.size)


class Slots(nnx.Module):
    """`num` learned vectors; position i of kind SLOT shows the one whose number is in tokens[i]."""

    def __init__(self, num: int, size: int, axis: str):
        self.vectors = parameter((num, size), ("slots", axis), normal(1.0))

    def __call__(self, x_BLD: jax.Array, batch: Batch) -> jax.Array:
        """x with its SLOT positions replaced."""
        vectors = self.vectors[...]
        # Words have larger numbers; what is looked up for them is not used.
        shown = vectors[jnp.minimum(batch["tokens"], len(vectors) - 1)].astype(x_BLD.dtype)
        return jnp.where((batch["kinds"] == schema.SLOT)[..., None], shown, x_BLD)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, in float32 as PyTorch has it: in bfloat16 the argument of erf loses its digits."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def show(patches_BPD: jax.Array, batch: Batch) -> jax.Array:
    """Puts row patch_index[i] at position i: [B, P, D] -> [B, L, D]; row 0 where there is none."""
    return jnp.take_along_axis(patches_BPD, jnp.maximum(batch["patch_index"], 0)[..., None], axis=1)


def inner_hw(patch_hw_BP2: jax.Array, merge_size: int) -> jax.Array:
    """Row and column of each patch of each image token, in units of p pixels: [B, P, m * m, 2]."""
    m = merge_size
    inner = jnp.stack(jnp.meshgrid(jnp.arange(m), jnp.arange(m), indexing="ij"), -1).reshape(m * m, 2)
    return patch_hw_BP2[:, :, None] * m + inner[None, None]


def image_of_patch(batch: Batch) -> jax.Array:
    """The image number [B, P] of each row of `patches`; 0 for rows that are not shown."""
    index, image_ids = batch["patch_index"], batch["image_ids"]
    rows = jnp.arange(index.shape[0])[:, None]
    num_patches = batch["patches"].shape[1]
    numbers = jnp.zeros((index.shape[0], num_patches + 1), image_ids.dtype)
    # Positions without a patch write to a row of their own, which is cut off.
    return numbers.at[rows, jnp.where(index >= 0, index, num_patches)].set(image_ids)[:, :num_patches]
