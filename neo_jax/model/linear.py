"""Products of activations with parameters.

Parameters are float32, activations of the compute dtype, and so are products. The gradient of a parameter is
a sum over the tokens of all devices. Devices add theirs up in float32: bfloat16 loses what is small beside
the sum.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from neo_jax.params import Initializer, parameter, vector

# x [T, in] @ w [in, out] -> [T, out] in the dtype of x; the gradient of w is summed in the dtype of w.
Product = Callable[[jax.Array, jax.Array], jax.Array]

# What a remat policy keeps it must know by name where gradients are not JAX's own.
CHECKPOINT_NAME = "product"


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """The Product without quantization."""
    if x.dtype == w.dtype:
        return jnp.matmul(x, w)
    return checkpoint_name(_matmul(x, w), CHECKPOINT_NAME)


@jax.custom_vjp
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w.astype(x.dtype)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, w), (x, w)


def _backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    return g @ w.astype(g.dtype).T, weight_gradient(x, w, g)


_matmul.defvjp(_forward, _backward)


def weight_gradient(x: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
    """x^T g in the dtype of w, in which devices add theirs up. XLA does that before a cast of the result."""
    return jnp.matmul(x.T, g, preferred_element_type=w.dtype)


def linear(x: jax.Array, weight: jax.Array, num_inputs: int = 1, product: Product = matmul) -> jax.Array:
    """Contracts the last `num_inputs` dimensions of x with the first ones of weight, in the dtype of x.

    x [..., in...], weight [in..., out...] -> [..., out...]. Computed as one `product` of two matrices: with
    more dimensions XLA on CPUs transposes activations to form the weight's gradient, at half the speed.
    """
    inputs, outputs = weight.shape[:num_inputs], weight.shape[num_inputs:]
    leading = x.shape[: x.ndim - num_inputs]
    matrix = weight.reshape(math.prod(inputs), math.prod(outputs))
    return product(x.reshape(-1, math.prod(inputs)), matrix).reshape(*leading, *outputs)


def on_last(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter [D...] as [..., D...], the shape and dtype of x."""
    return jnp.broadcast_to(weight, x.shape).astype(x.dtype)


class Linear(nnx.Module):
    """x @ weight, plus bias where `bias_init` is given: [..., in...] -> [..., out...]."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        init: Initializer,
        bias_init: Initializer | None = None,
        product: Product = matmul,
    ):
        """`inputs`, `outputs`: logical axis -> size, in order."""
        self.num_inputs, self.product = len(inputs), product
        axes = (*inputs, *outputs)
        self.weight = parameter((*inputs.values(), *outputs.values()), axes, init)
        self.bias = None if bias_init is None else vector(outputs.values(), outputs, bias_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = linear(x, self.weight[...], self.num_inputs, self.product)
        return x if self.bias is None else x + on_last(self.bias[...], x)
