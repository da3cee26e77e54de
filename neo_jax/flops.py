"""Floating-point operations of a training step, counted from what is really in the batch.

Convention ("model FLOPs"): a multiply-add is two operations; a matrix counts for the tokens that need it,
learned experts for those that take them; attention for the (query, key) pairs inside the intervals; backward
costs two products per forward product, one of them only for weights that train. Recomputation, softmax, norms
and padding count nothing.
"""

import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from neo_jax import hardware
from neo_jax.model.coords import COORDS
from neo_jax.params import ParamSpec

# Parameters that are looked up and multiply nothing.
LOOK_UPS = ("token_embed", "patch_embed/slots", "patch_embed/positions")


def train_flops(
    model: ConfigDict, specs: Mapping[str, ParamSpec], trainable: frozenset[str], metrics: Mapping
) -> float:
    """FLOPs of one step, over all devices.

    Args:
        model: config.model.
        metrics: the step's `tokens`, `visual_tokens`, `patches`, `supervised_tokens`, `attended_pairs` and,
            for heads that train, `objective_vectors`.
    """
    sizes = {
        name: float(metrics[name]) for name in ("tokens", "visual_tokens", "patches", "supervised_tokens")
    }

    def uses(path: str) -> float:
        """How many vectors the step multiplies with this matrix."""
        if path == "head":
            return sizes["supervised_tokens"]
        if path.startswith("objectives/"):
            return float(metrics.get("objective_vectors", {}).get(path.split("/")[1], 0.0))
        if path.startswith("patch_embed/"):
            # Seen one by one inside a token: by the first convolution, and by EVE's keys and values.
            by_patch = path.startswith(("patch_embed/patch/", "patch_embed/local/k/", "patch_embed/local/v/"))
            return sizes["patches"] * (model.embed.merge_size**2 if by_patch else 1)
        if "/visual/" in path:
            return sizes["visual_tokens"]
        if "/experts/" in path:
            return sizes["tokens"] * model.experts.per_token / model.experts.num
        return sizes["tokens"] - (sizes["visual_tokens"] if "/text/" in path else 0.0)

    total = 0.0
    for path, spec in specs.items():
        if path.startswith(LOOK_UPS) or not spec.decays:
            continue
        total += (4 + 2 * (path in trainable)) * uses(path) * math.prod(spec.shape)
    if model.tie_embeddings:
        products = 4 + 2 * ("token_embed" in trainable)
        total += products * sizes["supervised_tokens"] * model.hidden_size * model.vocab_size
    # Query-key products, then values.
    channels = COORDS[model.coords.kind](model.coords, model.head_dim).qk_size + model.head_dim
    return total + 6 * float(metrics["attended_pairs"]) * model.num_heads * channels * model.num_layers


def peak(dtype: str, size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of one device of this machine, the yardstick of MFU.

    The published peak of a known chip, in bfloat16 whatever the `dtype` and config.model.quantization: what
    8-bit products save shows as a higher MFU. For a CPU, or a chip that is not in neo_jax/hardware.py, the
    best of a few [size, size] matrix products.
    """
    chip = hardware.of_device(jax.devices()[0].device_kind)
    if chip is not None:
        return chip.peak_bf16 / chip.devices_per_chip
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
