"""One decoder layer: pre-norm attention and a feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.model.attention import Attention, Cache
from neo_jax.model.coords import Rotary
from neo_jax.model.linear import Linear
from neo_jax.model.mask import Intervals
from neo_jax.model.norm import NORMS
from neo_jax.model.quantized import product
from neo_jax.model.route import Routing, apply, routed
from neo_jax.params import normal, zeros


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ConfigDict):
        self.gate, self.up, self.down = _up(config), _up(config), _down(config)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BLD)) * self.up(x_BLD))


class ReluSquared(nnx.Module):
    """down(relu(up(x))^2) (So et al., 2021), as in Persimmon and Fuyu."""

    def __init__(self, config: ConfigDict):
        self.up, self.down = _up(config), _down(config)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return self.down(jnp.square(jax.nn.relu(self.up(x_BLD))))


MLPS = {"swiglu": SwiGLU, "relu2": ReluSquared}


def _up(config: ConfigDict) -> Linear:
    return _linear(config, {"embed": config.hidden_size}, {"mlp": config.mlp_size})


def _down(config: ConfigDict) -> Linear:
    return _linear(config, {"mlp": config.mlp_size}, {"embed": config.hidden_size})


def _linear(config: ConfigDict, inputs: dict[str, int], outputs: dict[str, int]) -> Linear:
    bias_init = zeros if config.mlp_bias else None
    return Linear(inputs, outputs, normal(config.init_std), bias_init, product(config.quantization))


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Pre-buffer and post layers are both this."""

    def __init__(self, config: ConfigDict):
        def norm() -> nnx.Module:
            return NORMS[config.norm](config.hidden_size, "embed", config.norm_eps)

        self.attention_norm = routed(config.route.norm, norm, permutes=False)
        self.attention = Attention(config)
        self.mlp_norm = routed(config.route.norm, norm, permutes=False)
        self.mlp = routed(config.route.mlp, lambda: MLPS[config.mlp](config))

    def __call__(
        self,
        x_BLD: jax.Array,
        table: Rotary,
        intervals: Intervals,
        routing: Routing | None = None,
        cache: Cache | None = None,
        slots_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        normed = apply(self.attention_norm, x_BLD, routing)
        attended, cache = self.attention(normed, table, intervals, routing, cache, slots_BL)
        x_BLD = x_BLD + attended
        return x_BLD + apply(self.mlp, apply(self.mlp_norm, x_BLD, routing), routing), cache
