"""Patch embeddings: raw pixels of image tokens -> vectors of the residual stream.

Every kind maps `(patches [B, P, patch_dim] uint8, patch_hw [B, P, 2] int32) -> [B, P, D]`, one row per image
token, so that images of any shape share one batched matrix product: no padding and no loop over images.
"""

import math

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.model.coords import frequencies
from neo_jax.model.linear import linear, on_last
from neo_jax.params import parameter, uniform


class ConvGeluConv(nnx.Module):
    """NEO's embedding (section 3): conv p x p -> GELU -> 2-D rotation -> conv m x m, per token.

    Both convolutions have stride = kernel, so they only see one token's square of pixels and are two matrix
    products: [B, P, m * m, p * p * 3] @ [p * p * 3, C], then [B, P, m * m * C] @ [m * m * C, D].
    """

    def __init__(self, config: ConfigDict):
        embed = config.embed
        self.patch_size, self.merge_size = embed.patch_size, embed.merge_size
        self.theta = embed.rope_theta
        self.mean, self.std = tuple(embed.pixel_mean), tuple(embed.pixel_std)
        self.dtype = jnp.dtype(config.dtype)
        C, D = embed.hidden_size, config.hidden_size
        pixels, merged = 3 * self.patch_size**2, C * self.merge_size**2
        # PyTorch's convolution default, +-1/sqrt(fan_in), is what the original starts from.
        patch_init, merge_init = uniform(1 / math.sqrt(pixels)), uniform(1 / math.sqrt(merged))
        self.patch_kernel = parameter((pixels, C), ("pixels", "vision"), patch_init)
        self.patch_bias = parameter((C,), ("vision",), patch_init)
        self.merge_kernel = parameter((merged, D), ("vision", "embed"), merge_init)
        self.merge_bias = parameter((D,), ("embed",), merge_init)

    def pixels(self, patches_BPX: jax.Array) -> jax.Array:
        """uint8 squares (row-major y, x, rgb) -> normalised float32 [B, P, m * m, p * p * 3].

        The second-last axis lists the square's m x m patches row by row.
        """
        p, m = self.patch_size, self.merge_size
        chex.assert_axis_dimension(patches_BPX, -1, (p * m) ** 2 * 3)
        x = patches_BPX.reshape(*patches_BPX.shape[:2], m, p, m, p, 3)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6)
        x = x.astype(jnp.float32) / 255
        x = (x - on_last(jnp.asarray(self.mean), x)) / on_last(jnp.asarray(self.std), x)
        return x.reshape(*patches_BPX.shape[:2], m * m, p * p * 3)

    def convolve(self, pixels_BPmx: jax.Array) -> jax.Array:
        """First convolution and exact (erf) GELU: [B, P, m * m, C]."""
        x = linear(pixels_BPmx.astype(self.dtype), self.patch_kernel[...])
        return jax.nn.gelu(x + on_last(self.patch_bias[...], x), approximate=False)

    def rotate(self, x_BPmC: jax.Array, patch_hw_BP2: jax.Array) -> jax.Array:
        """Rotates adjacent channel pairs: first half by the patch's column, second half by its row."""
        m, half = self.merge_size, x_BPmC.shape[-1] // 2
        inner = jnp.stack(jnp.meshgrid(jnp.arange(m), jnp.arange(m), indexing="ij"), -1).reshape(m * m, 2)
        hw = patch_hw_BP2[:, :, None] * m + inner[None, None]  # [B, P, m * m, 2] in units of p pixels
        frequency = on_last(frequencies(half, self.theta), hw.astype(jnp.float32))
        angles = jnp.concatenate([hw[..., 1:] * frequency, hw[..., :1] * frequency], axis=-1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        pairs = x_BPmC.astype(jnp.float32).reshape(*x_BPmC.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x_BPmC.shape).astype(self.dtype)

    def merge(self, x_BPmC: jax.Array) -> jax.Array:
        """Second convolution: [B, P, D]."""
        x = x_BPmC.reshape(*x_BPmC.shape[:2], -1)
        x = linear(x, self.merge_kernel[...])
        return x + on_last(self.merge_bias[...], x)

    def __call__(self, patches_BPX: jax.Array, patch_hw_BP2: jax.Array) -> jax.Array:
        return self.merge(self.rotate(self.convolve(self.pixels(patches_BPX)), patch_hw_BP2))


EMBEDS = {"conv_gelu_conv": ConvGeluConv}
