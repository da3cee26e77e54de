"""Every GPU attention kernel compiled for an H100 on a machine without one: value and gradients.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python -m benchmarks.gpu_compile [--channels=256,128]

Needs `pip install -e '.[gpu,mosaic]'`; the variable says that CUDA's driver may be missing. `triton` and
`mosaic` are compiled to machine code. cuDNN chooses its kernels on the GPU: of `cudnn` only the program that
calls them is. Prints what each program calls, and its temporaries, for the heads of gpu_attention.py.
"""

import argparse
import re
import sys
from collections import Counter
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.attention import numbers
from benchmarks.gpu_attention import D_V, K, N
from neo_jax.model.attention import ATTENTION
from neo_jax.model.mask import Intervals

# What XLA wants to know of an H100 SXM, in its own format and units.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
LENGTH = 8192


class Gpu(NamedTuple):
    """What Tokamax asks of the device it compiles for."""

    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    compute_capability: str = "9.0"
    core_count: int = 132


def compile_for(sharding: NamedSharding, kernel: str, channels: int) -> jax.stages.Compiled:
    """Value and gradients of one row, as in benchmarks/gpu_attention.py."""

    def of(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, LENGTH, *shape), dtype, sharding=sharding)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, intervals: Intervals) -> jax.Array:
        return ATTENTION[kernel](q, k, v, intervals, channels**-0.5).astype(jnp.float32).sum()

    intervals = Intervals(of(dtype="int32"), of(dtype="int32"))
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return both.lower(of(N, channels), of(K, channels), of(K, D_V), intervals).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--channels", type=numbers, default=[256, 128], help="of queries and keys")
    args = parser.parse_args()
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    except NotImplementedError:
        sys.exit("error: JAX has no CUDA plugin here: pip install -e '.[gpu,mosaic]'")
    mesh = topologies.make_mesh(topology, (1,), ("data",))
    cudnn = "jax._src.cudnn.fused_attention_stablehlo."
    with (
        mock.patch("jax.extend.backend.get_default_device", Gpu),
        mock.patch(cudnn + "check_cudnn_version", lambda: 91000),
        mock.patch(cudnn + "check_compute_capability", lambda _: True),
        mock.patch(cudnn + "is_cuda_compute_capability_equal", lambda _: False),
    ):
        for channels in args.channels:
            for kernel in ("triton", "mosaic", "cudnn"):
                compiled = compile_for(NamedSharding(mesh, PartitionSpec()), kernel, channels)
                calls = Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))
                megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
                called = ", ".join(f"{number} {name}" for name, number in calls.items())
                print(f"{channels:>5} channels  {kernel:<8}{megabytes:>8.0f} MB  {called}", flush=True)


if __name__ == "__main__":
    main()
