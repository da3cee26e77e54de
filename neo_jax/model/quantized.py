"""Products with 8-bit operands: SwitchBack (Wortsman et al., 2023, arXiv 2304.13013) by means of qwix.

    y  = x8 @ w8      every row of x and every column of w has a scale of its own
    dx = g8 @ w8^T    every row of g, and here every row of w, which is quantized again
    dw = x^T @ g      not quantized: it sums over all tokens of a batch, and errors grow with the sum

Scales are dynamic: the largest magnitude in x, w or g as it is now becomes the largest 8-bit number. There is
no state, tokens do not depend on each other, and the weights that train and are saved stay float32.

Layers use it for their projections and feed-forward networks, where nearly all products with weights are.
The patch embedding sees pixels, the head decides the loss, and scores of attention are exponentiated: they
are few or sensitive, and stay in the compute dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from neo_jax.errors import UserError
from neo_jax.model.linear import CHECKPOINT_NAME, Product, matmul, weight_gradient

# Formats of x and w, and of gradients. E4M3 has the digits that values need, E5M2 the range that gradients
# need (Micikevicius et al., 2022).
FORMATS = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}
# By itself qwix makes the largest magnitude 127.5, which is rounded now to 127, now to -128; so it is 127.
CALIBRATION = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}


@functools.cache
def product(quantization: str, reduce_dtype: str) -> Product:
    """The product that config.model.quantization and config.model.reduce_dtype name.

    Raises:
        UserError: qwix is not installed.
    """
    chosen = matmul if quantization == "none" else _switch_back(quantization)
    # Parameters are float32; a validated config asks for that or for the dtype of x.
    return chosen if reduce_dtype == "float32" else lambda x, w: chosen(x, w.astype(x.dtype))


def _switch_back(quantization: str) -> Product:
    """Integers are summed in int32, fp8 in float32, and scaled in float32."""
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.quantization: {quantization!r} needs qwix: pip install 'neo_jax[quantization]'"
        ) from error
    value_format, gradient_format = FORMATS[quantization]

    def narrow(a: jax.Array, dtype: str, axis: int) -> qwix.QArray:
        """a with 8 bits, and a scale for each index of `axis`."""
        # Scales take the dtype of what they scale, and bfloat16 has fewer digits than the sums.
        a = a.astype(jnp.float32)
        return qwix.quantize(a, dtype, channelwise_axes=(axis,), calibration_method=CALIBRATION[quantization])

    def quantized(a: jax.Array, a_format: str, b: jax.Array, contracted: int) -> jax.Array:
        """a [T, K] times b along its dimension `contracted`, of size K; each other index has its scale."""
        a8, b8 = narrow(a, a_format, 0), narrow(b, value_format, 1 - contracted)
        return qwix.dot_general(a8, b8, (((1,), (contracted,)), ((), ()))).astype(a.dtype)

    @jax.custom_vjp
    def switch_back(x: jax.Array, w: jax.Array) -> jax.Array:
        return quantized(x, value_format, w.astype(x.dtype), contracted=0)

    def forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return switch_back(x, w), (x, w)

    def backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, w = kept
        return quantized(g, gradient_format, w.astype(g.dtype), contracted=1), weight_gradient(x, w, g)

    switch_back.defvjp(forward, backward)
    return lambda x, w: checkpoint_name(switch_back(x, w), CHECKPOINT_NAME)
