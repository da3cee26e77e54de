"""Floating-point operations of a training step, counted from what is really in the batch.

Convention ("model FLOPs"): a multiply-add is two operations; a matrix counts for the tokens that need it;
attention for the (query, key) pairs inside the intervals; backward costs two products per forward product,
one of them only for weights that train. Recomputation, softmax, norms and padding count nothing.
"""

import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from neo_jax.params import ParamSpec


def train_flops(
    model: ConfigDict, specs: Mapping[str, ParamSpec], trainable: frozenset[str], metrics: Mapping
) -> float:
    """FLOPs of one step, over all devices.

    Args:
        model: config.model.
        metrics: the step's `tokens`, `patches`, `supervised_tokens` and `attended_pairs`.
    """
    uses = {"patch_embed": metrics["patches"], "head": metrics["supervised_tokens"]}
    total = 0.0
    for path, spec in specs.items():
        if path == "token_embed" or not spec.decays:
            continue  # a look-up; vectors
        times = float(uses.get(path.split("/")[0], metrics["tokens"]))
        if path == "patch_embed/patch_kernel":
            times = times * model.embed.merge_size**2
        total += (4 + 2 * (path in trainable)) * times * math.prod(spec.shape)
    if model.tie_embeddings:
        total += 6 * float(metrics["supervised_tokens"]) * model.hidden_size * model.vocab_size
    widened = 2 if model.coords.kind == "thw" else 1
    channels = model.num_heads * model.head_dim * (widened + 1)  # query-key products, then values
    return total + 6 * float(metrics["attended_pairs"]) * channels * model.num_layers


def measured_peak(dtype: str, size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of a [size, size] matrix product on one device of this machine: the yardstick of MFU."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
