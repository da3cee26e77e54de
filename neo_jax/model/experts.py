"""Route kind `topk`: a learned mixture of experts in place of a layer's feed-forward network.

A router gives every token a probability for each expert; the token goes through the k likeliest and takes the
sum of what they say, weighted by those probabilities. With k > 1 the weights are first divided by their sum
(Qwen3-MoE's norm_topk_prob); with k = 1 that would leave 1 and the router without a gradient, so the
probability stays (Switch Transformer; Shukor et al. 2025). Each expert is 1/k as wide as the dense network: a
token uses as many weights.

Dropless: no expert has a capacity, a token's result depends on that token alone, and padding takes nobody's
place. Tokens are sorted by expert and multiplied group by group (kernels/grouped.py), each device sorting its
own. All experts are on every device as a dense network would be, split by width, not by expert: devices have
equal work wherever the tokens go, and none are sent.

Dimensions: B rows, L positions, T = B * L tokens, D width, E experts, k of them for a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from neo_jax import mesh as mesh_lib, params as params_lib
from neo_jax.kernels.grouped import grouped
from neo_jax.model.linear import Linear
from neo_jax.model.mlp import MLPS, Sizes
from neo_jax.model.route import Routing, permute
from neo_jax.params import Params, normal, parameter


class Load(NamedTuple):
    """What the router of a layer did with the real tokens of a batch; with a leading axis, of every layer."""

    tokens: jax.Array  # [E] float32, tokens that took the expert; their sum is k times the tokens
    probability: jax.Array  # [E] float32, sum over tokens of its probability


class ExpertLinear(nnx.Module):
    """A matrix per expert."""

    def __init__(self, config: ConfigDict, inputs: Sizes, outputs: Sizes):
        sizes = {"experts": config.experts.num, **inputs, **outputs}
        self.weight = parameter(sizes.values(), sizes, normal(config.init_std))

    def __call__(self, x_SI: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Rows sorted by expert, and how many each has."""
        return grouped(x_SI, self.weight[...], sizes_E)


class Experts(nnx.Module):
    """The router and its experts."""

    def __init__(self, config: ConfigDict):
        self.num, self.per_token = config.experts.num, config.experts.per_token
        self.reduce_dtype = jnp.dtype(config.reduce_dtype)
        router = {"embed": config.hidden_size}, {"experts": self.num}
        self.router = Linear(*router, normal(config.init_std), product=_exact)
        one = ConfigDict(config.to_dict())
        one.mlp_size = config.mlp_size // self.per_token
        self.experts = MLPS[config.mlp](one, ExpertLinear)
        self.axes = tuple((path, spec.axes) for path, spec in params_lib.abstract(self.experts).items())

    def __call__(self, x_BLD: jax.Array, routing: Routing | None) -> tuple[jax.Array, Load | None]:
        """The sum of each token's experts [B, L, D]; the load, except in decoding, which has no routing."""
        probability_BLE = jax.nn.softmax(self.router(x_BLD.astype(jnp.float32)))
        weight_BLk, expert_BLk = jax.lax.top_k(probability_BLE, self.per_token)
        load = None if routing is None else self._load(probability_BLE, expert_BLk, routing.real)
        if self.per_token > 1:
            weight_BLk = weight_BLk / weight_BLk.sum(axis=-1, keepdims=True)
        return self._on_each_device(x_BLD, weight_BLk.astype(x_BLD.dtype), expert_BLk), load

    def _load(self, probability_BLE: jax.Array, expert_BLk: jax.Array, real_BL: jax.Array) -> Load:
        real = real_BL[..., None].astype(jnp.float32)
        taken_BLE = jax.nn.one_hot(expert_BLk, self.num).sum(axis=-2)
        return Load((taken_BLE * real).sum(axis=(0, 1)), (probability_BLE * real).sum(axis=(0, 1)))

    def _on_each_device(self, x_BLD: jax.Array, weight_BLk: jax.Array, expert_BLk: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        bound: Params = params_lib.abstract(self.experts)
        weights = {path: matrix.astype(self.reduce_dtype) for path, matrix in bound.items()}
        if mesh.empty or mesh.size == 1:
            return self._apply(x_BLD, weight_BLk, expert_BLk, weights)
        splits = {path: mesh_lib.partition(axes) for path, axes in self.axes}
        tokens = mesh_lib.divisible(mesh, x_BLD.shape, mesh_lib.partition(("batch", "length", "width")))

        def local(x: jax.Array, weight: jax.Array, expert: jax.Array, weights: Params) -> jax.Array:
            whole = {path: _whole(matrix, splits[path], x.dtype) for path, matrix in weights.items()}
            # A device has a part of every expert's inner width, whose products are parts of a sum.
            return jax.lax.psum(self._apply(x, weight, expert, whole), mesh_lib.RULES["mlp"])

        return jax.shard_map(
            local, in_specs=(tokens, tokens, tokens, splits), out_specs=tokens, check_vma=False
        )(x_BLD, weight_BLk, expert_BLk, weights)

    def _apply(
        self, x_BLD: jax.Array, weight_BLk: jax.Array, expert_BLk: jax.Array, weights: Params
    ) -> jax.Array:
        """The layer without its router, on one device."""
        B, L, D = x_BLD.shape
        order = jnp.argsort(expert_BLk.ravel(), stable=True)[None]
        inverse = jnp.argsort(order)
        # A token stands k times in the sorted list of those that want an expert.
        sorted_SD = permute(jnp.repeat(x_BLD.reshape(1, B * L, D), self.per_token, axis=1), order, inverse)[0]
        sizes_E = jnp.bincount(expert_BLk.ravel(), length=self.num).astype(jnp.int32)
        y_SD = params_lib.bind(self.experts, weights)(sorted_SD, sizes_E)
        y_BLkD = permute(y_SD[None], inverse, order).reshape(B, L, self.per_token, D)
        return (y_BLkD * weight_BLk[..., None]).sum(axis=-2)


def _exact(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A product in float32 also where the default is bfloat16, on TPUs: a rounded tie is another expert."""
    return jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(matrix: jax.Array, split: PartitionSpec, dtype: jnp.dtype) -> jax.Array:
    """A device's part of a matrix, whole but for the inner width.

    It is gathered in `dtype`, that of products, and its gradient summed and scattered in the matrix's own.
    """
    whole = matrix.astype(dtype)
    for dim, axis in _gathered(split):
        whole = jax.lax.all_gather(whole, axis, axis=dim, tiled=True)
    return whole.astype(matrix.dtype)


def _scattered(split: PartitionSpec, dtype: jnp.dtype, _: None, g: jax.Array) -> tuple[jax.Array]:
    for dim, axis in _gathered(split):
        g = jax.lax.psum_scatter(g, axis, scatter_dimension=dim, tiled=True)
    return (g,)


_whole.defvjp(lambda matrix, split, dtype: (_whole(matrix, split, dtype), None), _scattered)


def _gathered(split: PartitionSpec) -> list[tuple[int, str]]:
    """The dimensions that devices have parts of, inner width apart, and over which mesh axis."""
    return [(dim, axis) for dim, axis in enumerate(split) if axis not in (None, mesh_lib.RULES["mlp"])]
