"""One decoder layer: pre-norm attention and a feed-forward network, or a mixture of them."""

import jax
from flax import nnx
from ml_collections import ConfigDict

from neo_jax.model.attention import Attention, Cache
from neo_jax.model.coords import Rotary
from neo_jax.model.experts import Experts, Load
from neo_jax.model.mask import Intervals
from neo_jax.model.mlp import MLPS
from neo_jax.model.norm import NORMS
from neo_jax.model.route import Routing, apply, routed


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Pre-buffer and post layers are both this."""

    def __init__(self, config: ConfigDict):
        def norm() -> nnx.Module:
            return NORMS[config.norm](config.hidden_size, "embed", config.norm_eps)

        self.attention_norm = routed(config.route.norm, norm, permutes=False)
        self.attention = Attention(config)
        self.mlp_norm = routed(config.route.norm, norm, permutes=False)
        learned = config.route.mlp == "topk"
        self.mlp = Experts(config) if learned else routed(config.route.mlp, lambda: MLPS[config.mlp](config))

    def __call__(
        self,
        x_BLD: jax.Array,
        table: Rotary,
        intervals: Intervals,
        routing: Routing | None = None,
        cache: Cache | None = None,
        slots_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, Load | None]:
        """The stream after the layer; the cache, if there is one; what the router did, if there is one."""
        normed = apply(self.attention_norm, x_BLD, routing)
        attended, cache = self.attention(normed, table, intervals, routing, cache, slots_BL)
        x_BLD = x_BLD + attended
        normed = apply(self.mlp_norm, x_BLD, routing)
        if isinstance(self.mlp, Experts):
            said, load = self.mlp(normed, routing)
        else:
            said, load = apply(self.mlp, normed, routing), None
        return x_BLD + said, cache, load
