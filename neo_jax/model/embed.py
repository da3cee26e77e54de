"""Patch embeddings: raw pixels of image tokens -> vectors of the residual stream.

Every kind maps a batch (the token table; P rows of `patches`, uint8 squares of one image token each) to
[B, L, D]: the vectors of its PATCH and SLOT positions, anything elsewhere. One row per image token means that
images of any shape share one batched matrix product: no padding and no loop over images.

Dimensions: m * m patches of p x p pixels in an image token, C channels between pixels and stream, X pixels.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.model.coords import frequencies
from neo_jax.model.linear import Linear
from neo_jax.model.local_attention import LocalAttention
from neo_jax.model.mask import Batch
from neo_jax.model.norm import LayerNorm
from neo_jax.model.patches import Pixels, Slots, gelu, inner_hw, show
from neo_jax.params import normal, parameter, uniform, zeros


class NoImages(nnx.Module):
    """Of a language model without images: no parameters."""

    def __init__(self, config: ConfigDict):
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, batch: Batch) -> jax.Array:
        """Zeros [1, 1, 1]."""
        return jnp.zeros((1, 1, 1), self.dtype)


class LinearPatch(nnx.Module):
    """One matrix from pixels to the stream (Fuyu, SOLO, SAIL)."""

    def __init__(self, config: ConfigDict):
        embed = config.embed
        self.pixels, self.dtype = Pixels.of(embed), jnp.dtype(config.dtype)
        inputs = {"pixels": self.pixels.size * self.pixels.merge_size**2}
        bias_init = zeros if embed.bias else None
        self.project = Linear(inputs, {"embed": config.hidden_size}, normal(config.init_std), bias_init)
        if embed.slots:
            self.slots = Slots(embed.slots, config.hidden_size, "embed")

    def __call__(self, batch: Batch) -> jax.Array:
        x = self.pixels(batch["patches"]).astype(self.dtype)
        x = show(self.project(x.reshape(*x.shape[:2], -1)), batch)
        return self.slots(x, batch) if hasattr(self, "slots") else x


class ConvGeluConv(nnx.Module):
    """conv p x p -> GELU -> 2-D rotation -> conv m x m, per token (NEO section 3; EVEv2 without rotation).

    Both convolutions have stride = kernel, so they only see one token's square of pixels and are two matrix
    products: [B, P, m * m, p * p * 3] @ [p * p * 3, C], then [B, P, m * m * C] @ [m * m * C, D].
    """

    def __init__(self, config: ConfigDict):
        embed = config.embed
        self.pixels, self.dtype = Pixels.of(embed), jnp.dtype(config.dtype)
        self.merge_size, self.theta, self.rotates = embed.merge_size, embed.rope_theta, embed.rotate
        C, D = embed.hidden_size, config.hidden_size
        merged = C * self.merge_size**2
        # PyTorch's convolution default, +-1/sqrt(fan_in), is what the original starts from.
        patch_init, merge_init = uniform(1 / math.sqrt(self.pixels.size)), uniform(1 / math.sqrt(merged))
        self.patch = Linear({"pixels": self.pixels.size}, {"vision": C}, patch_init, patch_init)
        self.merge = Linear({"vision": merged}, {"embed": D}, merge_init, merge_init)
        if embed.slots:
            self.slots = Slots(embed.slots, D, "embed")

    def convolve(self, pixels_BPmx: jax.Array) -> jax.Array:
        """First convolution and exact (erf) GELU: [B, P, m * m, C]."""
        return gelu(self.patch(pixels_BPmx.astype(self.dtype)))

    def rotate(self, x_BPmC: jax.Array, patch_hw_BP2: jax.Array) -> jax.Array:
        """Rotates adjacent channel pairs: first half by the patch's column, second half by its row."""
        half = x_BPmC.shape[-1] // 2
        hw = inner_hw(patch_hw_BP2, self.merge_size)
        frequency = jnp.expand_dims(frequencies(half, self.theta), range(hw.ndim - 1))
        angles = jnp.concatenate([hw[..., 1:] * frequency, hw[..., :1] * frequency], axis=-1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        pairs = x_BPmC.astype(jnp.float32).reshape(*x_BPmC.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x_BPmC.shape).astype(self.dtype)

    def __call__(self, batch: Batch) -> jax.Array:
        x = self.convolve(self.pixels(batch["patches"]))
        if self.rotates:
            x = self.rotate(x, batch["patch_hw"])
        x = show(self.merge(x.reshape(*x.shape[:2], -1)), batch)
        return self.slots(x, batch) if hasattr(self, "slots") else x


class UnshuffleMLP(nnx.Module):
    """conv p x p + learned position in the tile -> m x m patches side by side -> (LayerNorm,) MLP.

    The embedding of InternVL's native descendants, Mono-InternVL and HoVLE (methods.md 1.3, 1.4): an image is
    cut into tiles of `tile_size` pixels, each an image of its own in the token table.
    """

    def __init__(self, config: ConfigDict):
        embed = config.embed
        self.pixels, self.dtype = Pixels.of(embed), jnp.dtype(config.dtype)
        self.merge_size, self.grid = embed.merge_size, embed.tile_size // embed.patch_size
        C, D = embed.hidden_size, config.hidden_size
        patch_init = uniform(1 / math.sqrt(self.pixels.size))
        self.patch = Linear({"pixels": self.pixels.size}, {"vision": C}, patch_init, patch_init)
        self.positions = parameter((self.grid**2, C), ("positions", "vision"), normal(1.0))
        merged = C * self.merge_size**2
        if embed.norm:
            self.norm = LayerNorm(merged, "vision", 1e-5)
        up_init, out_init = uniform(1 / math.sqrt(merged)), uniform(1 / math.sqrt(D))
        self.up = Linear({"vision": merged}, {"mlp": D}, up_init, up_init)
        self.out = Linear({"mlp": D}, {"embed": D}, out_init, out_init)

    def __call__(self, batch: Batch) -> jax.Array:
        x = self.patch(self.pixels(batch["patches"]).astype(self.dtype))
        hw = inner_hw(batch["patch_hw"], self.merge_size)
        x = x + self.positions[...][hw[..., 0] * self.grid + hw[..., 1]].astype(x.dtype)
        x = x.reshape(*x.shape[:2], -1)
        x = self.norm(x) if hasattr(self, "norm") else x
        return show(self.out(gelu(self.up(x))), batch)


EMBEDS: dict[str, Callable[[ConfigDict], nnx.Module]] = {
    "none": NoImages,
    "conv_gelu_conv": ConvGeluConv,
    "linear_patch": LinearPatch,
    "local_attention": LocalAttention,
    "unshuffle_mlp": UnshuffleMLP,
}
