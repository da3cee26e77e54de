"""Products of activations with parameters."""

import math

import jax


def linear(x: jax.Array, weight: jax.Array, num_inputs: int = 1) -> jax.Array:
    """Contracts the last `num_inputs` dimensions of x with the first ones of weight, in the dtype of x.

    x [..., in...], weight [in..., out...] -> [..., out...]. Computed as one product of two matrices: with
    more dimensions XLA on CPUs transposes activations to form the weight's gradient, at half the speed.
    """
    inputs, outputs = weight.shape[:num_inputs], weight.shape[num_inputs:]
    leading = x.shape[: x.ndim - num_inputs]
    matrix = weight.astype(x.dtype).reshape(math.prod(inputs), math.prod(outputs))
    return (x.reshape(-1, math.prod(inputs)) @ matrix).reshape(*leading, *outputs)


def on_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter vector [D], shaped to be combined with x [..., D] in the dtype of x."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)
