"""Products of activations with parameters."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from neo_jax.model.quantized import Product
from neo_jax.params import Initializer, parameter, vector


def linear(x: jax.Array, weight: jax.Array, num_inputs: int = 1, product: Product = jnp.matmul) -> jax.Array:
    """Contracts the last `num_inputs` dimensions of x with the first ones of weight, in the dtype of x.

    x [..., in...], weight [in..., out...] -> [..., out...]. Computed as one `product` of two matrices: with
    more dimensions XLA on CPUs transposes activations to form the weight's gradient, at half the speed.
    """
    inputs, outputs = weight.shape[:num_inputs], weight.shape[num_inputs:]
    leading = x.shape[: x.ndim - num_inputs]
    matrix = weight.astype(x.dtype).reshape(math.prod(inputs), math.prod(outputs))
    return product(x.reshape(-1, math.prod(inputs)), matrix).reshape(*leading, *outputs)


def on_last(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter [D...] in the dtype of x, shaped to be combined with x [..., D...]."""
    return weight.astype(x.dtype).reshape((1,) * (x.ndim - weight.ndim) + weight.shape)


class Linear(nnx.Module):
    """x @ weight, plus bias where `bias_init` is given: [..., in...] -> [..., out...]."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        init: Initializer,
        bias_init: Initializer | None = None,
        product: Product = jnp.matmul,
    ):
        """`inputs`, `outputs`: logical axis -> size, in order."""
        self.num_inputs, self.product = len(inputs), product
        axes = (*inputs, *outputs)
        self.weight = parameter((*inputs.values(), *outputs.values()), axes, init)
        self.bias = None if bias_init is None else vector(outputs.values(), outputs, bias_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = linear(x, self.weight[...], self.num_inputs, self.product)
        return x if self.bias is None else x + on_last(self.bias[...], x)
