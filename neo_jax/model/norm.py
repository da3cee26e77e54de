"""Normalisation layers. A kind is built by `NORMS[kind](size, axis, eps)`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from neo_jax.model.linear import on_last
from neo_jax.params import ones, vector, zeros


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019).

    Statistics in float32, the result cast back to the input dtype and only then multiplied by the weight:
    in bfloat16 this order is part of the function (specs of Qwen3 and NEO).
    """

    def __init__(self, size: int, axis: str, eps: float):
        self.weight = vector((size,), (axis,), ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        x = (x32 * scale).astype(x.dtype)
        return x * on_last(self.weight[...], x)


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias over the last dimension (Ba et al., 2016), in float32."""

    def __init__(self, size: int, axis: str, eps: float):
        self.weight = vector((size,), (axis,), ones)
        self.bias = vector((size,), (axis,), zeros)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * on_last(self.weight[...], x32) + on_last(self.bias[...], x32)).astype(x.dtype)


NORMS: dict[str, Callable[[int, str, float], nnx.Module]] = {"rms": RMSNorm, "layer": LayerNorm}
