"""Matrix products of activations with parameters."""

import math

import jax


def linear(x: jax.Array, weight: jax.Array, num_inputs: int = 1) -> jax.Array:
    """Contracts the last `num_inputs` dimensions of x with the first ones of weight, in the dtype of x.

    x [..., in...], weight [in..., out...] -> [..., out...]. Computed as one product of two matrices: on CPUs XLA
    otherwise transposes the activations to form the weight's gradient (2x slower layers, docs/performance.md).
    """
    inputs, outputs = weight.shape[:num_inputs], weight.shape[num_inputs:]
    leading = x.shape[: x.ndim - num_inputs]
    matrix = weight.astype(x.dtype).reshape(math.prod(inputs), math.prod(outputs))
    return (x.reshape(-1, math.prod(inputs)) @ matrix).reshape(*leading, *outputs)
