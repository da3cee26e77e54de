"""Feed-forward networks. A kind is built by `MLPS[kind](config)`; experts of a mixture are of the same kinds.

With another `linear` than the dense one, what its layers need besides their input follows the input.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.model.linear import Linear
from neo_jax.model.quantized import product
from neo_jax.params import normal, zeros

Sizes = dict[str, int]  # logical axis -> size
Build = Callable[[ConfigDict, Sizes, Sizes], nnx.Module]


def dense(config: ConfigDict, inputs: Sizes, outputs: Sizes) -> Linear:
    bias_init = zeros if config.mlp_bias else None
    return Linear(
        inputs, outputs, normal(config.init_std), bias_init, product(config.quantization, config.reduce_dtype)
    )


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ConfigDict, linear: Build = dense):
        D, F = {"embed": config.hidden_size}, {"mlp": config.mlp_size}
        self.gate, self.up, self.down = linear(config, D, F), linear(config, D, F), linear(config, F, D)

    def __call__(self, x: jax.Array, *more: Any) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x, *more)) * self.up(x, *more), *more)


class ReluSquared(nnx.Module):
    """down(relu(up(x))^2) (So et al., 2021), as in Persimmon and Fuyu."""

    def __init__(self, config: ConfigDict, linear: Build = dense):
        D, F = {"embed": config.hidden_size}, {"mlp": config.mlp_size}
        self.up, self.down = linear(config, D, F), linear(config, F, D)

    def __call__(self, x: jax.Array, *more: Any) -> jax.Array:
        return self.down(jnp.square(jax.nn.relu(self.up(x, *more))), *more)


MLPS = {"swiglu": SwiGLU, "relu2": ReluSquared}
