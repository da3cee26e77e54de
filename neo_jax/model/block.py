"""One decoder layer: pre-norm attention and SwiGLU (the Qwen3 block)."""

import jax
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.model.attention import Attention, Cache
from neo_jax.model.coords import Rotary
from neo_jax.model.linear import linear
from neo_jax.model.mask import Intervals
from neo_jax.model.norm import RMSNorm
from neo_jax.params import normal, parameter


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020), no biases."""

    def __init__(self, config: ConfigDict):
        D, F = config.hidden_size, config.mlp_size
        self.gate = parameter((D, F), ("embed", "mlp"), normal(config.init_std))
        self.up = parameter((D, F), ("embed", "mlp"), normal(config.init_std))
        self.down = parameter((F, D), ("mlp", "embed"), normal(config.init_std))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        inner = jax.nn.silu(linear(x_BLD, self.gate[...])) * linear(x_BLD, self.up[...])
        return linear(inner, self.down[...])


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Pre-buffer and post layers are both this."""

    def __init__(self, config: ConfigDict):
        self.attention_norm = RMSNorm(config.hidden_size, "embed", config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, "embed", config.norm_eps)
        self.mlp = SwiGLU(config)

    def __call__(
        self,
        x_BLD: jax.Array,
        table: Rotary,
        intervals: Intervals,
        cache: Cache | None = None,
        slots_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        attended, cache = self.attention(self.attention_norm(x_BLD), table, intervals, cache, slots_BL)
        x_BLD = x_BLD + attended
        return x_BLD + self.mlp(self.mlp_norm(x_BLD)), cache
