"""Which attention kernel runs, and on which part of the batch.

Kernels are written for one device. On a mesh each device attends for its own rows, heads and queries: rows
are split over `data` and `fsdp`, heads over `tensor`, queries over `context`, whose devices first gather each
other's keys and values (in backward, the same gather sums their gradients).

Dimensions: as in chunked.py.
"""

import functools
import sys
from collections.abc import Callable, Mapping

import jax
from jax.sharding import PartitionSpec

from neo_jax import mesh as mesh_lib
from neo_jax.errors import UserError
from neo_jax.model.mask import Intervals

Attend = Callable[[jax.Array, jax.Array, jax.Array, Intervals, float], jax.Array]

AUTO = {"tpu": "splash", "gpu": "triton", "cpu": "xla_chunked"}  # what "auto" takes on a platform
ONLY_ON = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu", "mosaic": "gpu"}  # compile for one platform only
ONLY_IN = {"cudnn": "bfloat16", "mosaic": "bfloat16"}  # multiply in one dtype only


def dispatch(name: str, kernels: Mapping[str, Attend]) -> Attend:
    """The kernel `name`, or for "auto" the platform's, applied to each device's part of the batch.

    Platform and mesh are those in use when the result is traced.

    Raises (the result, when traced):
        UserError: the kernel does not exist on the platform or in the dtype of the queries.
    """

    def attend(
        q_BLNd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, intervals: Intervals, scale: float
    ) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        kernel = kernels[_choose(name, mesh_lib.platform(), q_BLNd.dtype.name)]
        if mesh.empty or mesh.size == 1:
            return kernel(q_BLNd, k_BSKd, v_BSKd, intervals, scale)
        queries = mesh_lib.divisible(mesh, q_BLNd.shape, _split("heads"))
        keys = mesh_lib.divisible(mesh, k_BSKd.shape, _split("kv_heads"))
        rows = PartitionSpec(*queries[:2])

        def local(q_BLNd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, intervals: Intervals) -> jax.Array:
            if keys[1] is not None and mesh.shape[keys[1]] > 1:
                k_BSKd, v_BSKd = (
                    jax.lax.all_gather(x, keys[1], axis=1, tiled=True) for x in (k_BSKd, v_BSKd)
                )
            return kernel(q_BLNd, k_BSKd, v_BSKd, intervals, scale)

        specs = queries, keys, keys, Intervals(rows, rows)
        on_shards = jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)
        return on_shards(q_BLNd, k_BSKd, v_BSKd, intervals)

    return attend


def _split(heads: str) -> PartitionSpec:
    return mesh_lib.partition(("batch", "length", heads, "head_dim"))


def _choose(name: str, platform: str, dtype: str) -> str:
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    if name == "auto":
        return _announce(AUTO[platform], platform)
    if ONLY_ON.get(name, platform) != platform:
        raise UserError(
            f"model.attention: {name!r} needs a {ONLY_ON[name]}, and this run is on a {platform}; set "
            "model.attention to 'auto'"
        )
    if ONLY_IN.get(name, dtype) != dtype:
        raise UserError(
            f"model.attention: {name!r} multiplies in {ONLY_IN[name]}, and model.dtype is {dtype!r}; set "
            f"model.dtype to {ONLY_IN[name]!r}, or model.attention to 'auto'"
        )
    return name


@functools.cache
def _announce(kernel: str, platform: str) -> str:
    """Says once per process what "auto" took."""
    print(f"attention: auto takes {kernel} on {platform}", file=sys.stderr)
    return kernel
