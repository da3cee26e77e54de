"""The native vision-language model: one decoder over a token table of words and image patches.

A batch is the token table of data_pipelines.schema (DESIGN section 3): B rows of L positions and P patches.
Embedding, coordinates and the attention intervals are pure functions of it. Layers are scanned, so compile
time does not grow with depth; pre-buffer and post layers are the same block in two stacks, each with its own
parameters, so that a stage can train one and leave the other without gradients.
"""

from collections.abc import Callable, Collection

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from neo_jax.kernels import grouped
from neo_jax.mesh import constrain
from neo_jax.model import linear
from neo_jax.model.attention import Cache
from neo_jax.model.block import Block
from neo_jax.model.coords import COORDS, Rotary, rotary
from neo_jax.model.embed import EMBEDS
from neo_jax.model.experts import Load
from neo_jax.model.mask import MASKS, Batch, Intervals, slide
from neo_jax.model.norm import NORMS
from neo_jax.model.route import Routing, is_visual, routing
from neo_jax.params import normal, parameter, stack

Caches = dict[str, Cache]  # one per stack, arrays with a leading layer axis

_POLICIES = jax.checkpoint_policies
# What backward finds kept of a layer, and what it computes again.
REMAT_POLICIES = {
    "none": None,  # everything is kept
    "full": _POLICIES.nothing_saveable,  # only the layer's input
    "dots": _POLICIES.save_from_both_policies(  # products with weights too
        _POLICIES.dots_with_no_batch_dims_saveable,
        _POLICIES.save_only_these_names(linear.CHECKPOINT_NAME, grouped.CHECKPOINT_NAME),
    ),
    "offload": _POLICIES.save_and_offload_only_these_names(  # the layer's input, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat(layer: Callable, policy: str) -> Callable:
    """The layer, with what its backward pass keeps decided by a name of REMAT_POLICIES."""
    return layer if policy == "none" else jax.checkpoint(layer, policy=REMAT_POLICIES[policy])


class Transformer(nnx.Module):
    """Built with ParamSpecs in place of arrays; `params.bind(model, params)` makes it callable."""

    def __init__(self, config: ConfigDict):
        D, V = config.hidden_size, config.vocab_size
        self.token_embed = parameter((V, D), ("vocab", "embed"), normal(config.init_std))
        self.patch_embed = EMBEDS[config.embed.kind](config)
        depths = {"pre_buffer": config.pre_buffer, "layers": config.num_layers - config.pre_buffer}
        self.stacks = tuple(name for name, depth in depths.items() if depth)
        self.depths = tuple(depths[name] for name in self.stacks)
        for name, depth in zip(self.stacks, self.depths, strict=True):
            setattr(self, name, stack(Block(config), depth))
        self.norm = NORMS[config.norm](D, "embed", config.norm_eps)
        self.tied = config.tie_embeddings
        if not self.tied:
            self.head = parameter((D, V), ("embed", "vocab"), normal(config.init_std))
        self.dtype = jnp.dtype(config.dtype)
        self.mask, self.window = MASKS[config.mask], config.sliding_window
        self.remat_policy = config.remat_policy
        coords = COORDS[config.coords.kind](config.coords, config.head_dim)
        self.rotary_parts, self.coords_kind = coords.parts, config.coords.kind
        self.cache_shapes = (config.num_kv_heads, coords.qk_size), (config.num_kv_heads, config.head_dim)
        self.adds_words = config.embed.merge == "add"
        self.routes = any(config.route[module] != "shared" for module in ("attention", "mlp", "norm"))
        self.visual_share = config.route.visual_share
        self.learns_routes = config.route.mlp == "topk"

    def head_DV(self) -> jax.Array:
        """The output matrix [D, V] float32."""
        return self.token_embed[...].T if self.tied else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        head = self.head_DV().astype(self.dtype)
        return jnp.einsum("...D,DV->...V", hidden, head, preferred_element_type=jnp.float32)

    def intervals(self, batch: Batch) -> Intervals:
        """The keys that each position of packed rows attends."""
        positions = jnp.arange(batch["segment_ids"].shape[1], dtype=jnp.int32)[None]
        return slide(self.mask(batch), positions, self.window)

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings [B, L, D]; visual positions show their patch or slot, or add it to their word."""
        words = self.embed_tokens(batch["tokens"])
        visual = self.patch_embed(batch)
        visual = words + visual if self.adds_words else visual
        x = jnp.where(is_visual(batch["kinds"])[..., None], visual, words)
        return constrain(x, "batch", "length", "width")

    def embed_tokens(self, tokens_BL: jax.Array) -> jax.Array:
        return self.token_embed[...][tokens_BL].astype(self.dtype)

    def __call__(self, batch: Batch) -> jax.Array:
        """Final hidden states [B, L, D] of packed rows."""
        return self.hidden_states(batch)[0]

    def hidden_states(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Final hidden states [B, L, D] and the residual stream after every layer [layers, B, L, D]."""
        final, after_layers, _ = self._forward(batch, self.embed(batch))
        return final, after_layers

    def taps(
        self, batch: Batch, layers: Collection[int]
    ) -> tuple[jax.Array, dict[int, jax.Array], Load | None]:
        """Final hidden states [B, L, D], the residual stream [B, L, D] at `layers`, and the routers' load.

        Layer 0 is the embeddings, layer i what the i-th layer leaves, the last one after the final norm. The
        load is [layers, E] each, None without learned experts.
        """
        embedded = self.embed(batch)
        final, after_layers, load = self._forward(batch, embedded)
        ends = {0: embedded, len(after_layers): final}
        streams = {layer: ends[layer] if layer in ends else after_layers[layer - 1] for layer in layers}
        return final, streams, load

    def _forward(self, batch: Batch, embedded: jax.Array) -> tuple[jax.Array, jax.Array, Load | None]:
        _check(batch)
        route = routing(batch["kinds"], self.visual_share) if self.routes else None
        x, _, after_layers, load = self._run(embedded, batch["coords"], self.intervals(batch), route)
        return x, after_layers, load

    def prefill(self, batch: Batch, cache_size: int) -> tuple[jax.Array, Caches]:
        """Runs rows holding one document each, from position 0, and keeps their keys and values.

        Prompts keep no budget of visual tokens, so routed layers run without a cut (route.py).
        Returns hidden states [B, L, D] and caches with `cache_size` slots, position i in slot i.
        """
        _check(batch)
        B, L = batch["tokens"].shape
        slots = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
        route = routing(batch["kinds"], visual_share=0.0) if self.routes else None
        x, caches, *_ = self._run(
            self.embed(batch),
            batch["coords"],
            self.intervals(batch),
            route,
            self._empty(B, cache_size),
            slots,
        )
        return x, caches

    def extend(
        self, tokens_BT: jax.Array, coords_BT3: jax.Array, slots_BT: jax.Array, caches: Caches
    ) -> tuple[jax.Array, Caches]:
        """Continues cached documents by T text tokens each, at slots [B, T]: hidden states [B, T, D].

        A token sees slots 0 .. its own, or the window before it; slots past it may hold anything.
        """
        chex.assert_equal_shape([tokens_BT, slots_BT])
        intervals = slide(Intervals(jnp.zeros_like(slots_BT), slots_BT + 1), slots_BT, self.window)
        x, caches, *_ = self._run(self.embed_tokens(tokens_BT), coords_BT3, intervals, None, caches, slots_BT)
        return x, caches

    def _run(
        self,
        x: jax.Array,
        coords: jax.Array,
        intervals: Intervals,
        route: Routing | None,
        caches: Caches | None = None,
        slots: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches, jax.Array, Load | None]:
        table = rotary(self.rotary_parts, coords)
        new_caches: dict = {}
        by_stack = []
        for name in self.stacks:
            cache = caches[name] if caches is not None else None
            x, (new_caches[name], *rest) = self._scan(
                getattr(self, name), x, table, intervals, route, cache, slots
            )
            by_stack.append(rest)
        taps, load = jax.tree.map(lambda *parts: jnp.concatenate(parts), *by_stack)
        return self.norm(x), new_caches, taps, load

    def _scan(
        self,
        block: Block,
        x: jax.Array,
        table: Rotary,
        intervals: Intervals,
        route: Routing | None,
        cache: Cache | None,
        slots: jax.Array | None,
    ) -> tuple[jax.Array, tuple[Cache | None, jax.Array, Load | None]]:
        graph, params = nnx.split(block)

        def layer(x: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
            layer_params, layer_cache = inputs
            x = checkpoint_name(x, "residual")
            block = nnx.merge(graph, layer_params)
            x, layer_cache, load = block(x, table, intervals, route, layer_cache, slots)
            x = constrain(x, "batch", "length", "width")
            return x, (layer_cache, x, load)

        return jax.lax.scan(remat(layer, self.remat_policy), x, (params, cache))

    def _empty(self, B: int, cache_size: int) -> Caches:
        return {
            name: Cache(
                *(jnp.zeros((depth, B, cache_size, *shape), self.dtype) for shape in self.cache_shapes)
            )
            for name, depth in zip(self.stacks, self.depths, strict=True)
        }


def _check(batch: Batch) -> None:
    rows = ["tokens", "kinds", "segment_ids", "image_ids", "patch_index"]
    chex.assert_equal_shape([batch[name] for name in rows])
    B, L = batch["tokens"].shape
    chex.assert_shape(batch["coords"], (B, L, 3))
    chex.assert_shape(batch["patch_hw"], (B, batch["patches"].shape[1], 2))
    chex.assert_type(batch["patches"], jnp.uint8)
