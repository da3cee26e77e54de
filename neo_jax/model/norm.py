"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from neo_jax.model.linear import on_last
from neo_jax.params import ones, parameter


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019).

    Statistics in float32, the result cast back to the input dtype and only then multiplied by the weight:
    in bfloat16 this order is part of the function (specs of Qwen3 and NEO).
    """

    def __init__(self, size: int, axis: str, eps: float):
        self.weight = parameter((size,), (axis,), ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        x = (x32 * scale).astype(x.dtype)
        return x * on_last(self.weight[...], x)
