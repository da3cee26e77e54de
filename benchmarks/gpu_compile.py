"""The GPU attention kernels, and NEO-2B's step on eight H100s with each, compiled on a machine without GPU.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python -m benchmarks.gpu_compile

Needs `pip install -e '.[gpu,mosaic]'`; the variable says that CUDA's driver may be missing. `triton` and
`mosaic` are compiled to machine code. cuDNN chooses its kernels on the GPU: of `cudnn` only the program that
calls them is. Prints the memory (arguments + temporaries) and the calls of each program: value and gradients
of one row with the heads of gpu_attention.py, then the step on two meshes, with as many rows of 8,192 tokens
as `data` times `fsdp`.
"""

import argparse
import re
import sys
from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.gpu_attention import D_V, K, N
from neo_jax import config as config_lib, mesh as mesh_lib
from neo_jax.model.attention import ATTENTION
from neo_jax.model.mask import Intervals
from neo_jax.preflight.program import lower_step

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
KERNELS = ("triton", "mosaic", "cudnn")
LENGTH = 8192
MESHES = {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2, "context": 2}
CALLS = r'custom_call_target="([^"]+)"|(all-gather|all-reduce|reduce-scatter)-start\('


class Gpu(NamedTuple):
    """What Tokamax asks of the device it compiles for."""

    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    compute_capability: str = "9.0"
    core_count: int = 132


def compile_row(kernel: str, channels: int, sharding: NamedSharding) -> jax.stages.Compiled:
    """Value and gradients of one row, as in gpu_attention.py."""

    def of(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, LENGTH, *shape), dtype, sharding=sharding)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, intervals: Intervals) -> jax.Array:
        return ATTENTION[kernel](q, k, v, intervals, channels**-0.5).astype(jnp.float32).sum()

    intervals = Intervals(of(dtype="int32"), of(dtype="int32"))
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return both.lower(of(N, channels), of(K, channels), of(K, D_V), intervals).compile()


def compile_step(kernel: str, axes: dict[str, int], devices: Any) -> jax.stages.Compiled:
    """The stage `midtrain`, in which all of NEO-2B trains."""
    axes = dict.fromkeys(("data", "fsdp", "tensor", "context"), 1) | axes
    fields = {f"mesh.{axis}": size for axis, size in axes.items()} | {"mesh.num_devices": len(devices)}
    rows = axes["data"] * axes["fsdp"]
    for stage in ("pretrain", "midtrain", "sft"):
        fields |= {f"stage.{stage}.batch_size": rows, f"stage.{stage}.accumulate": 1}
    overrides = [(field, str(value)) for field, value in fields.items()]
    config = config_lib.load("configs/neo_2b.py", [*overrides, ("model.attention", kernel)])
    return lower_step(config, "midtrain", mesh_lib.make(config.mesh, devices)).compile()


def report(name: str, kernel: str, compiled: jax.stages.Compiled) -> None:
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    arguments, temporaries = (f"{size / 2**30:.2f}" for size in sizes)
    calls = Counter(custom or gather for custom, gather in re.findall(CALLS, compiled.as_text()))
    called = ", ".join(f"{number} {call}" for call, number in calls.items())
    print(f"{name:<32}{kernel:<8}{arguments:>7} + {temporaries:>5} GiB  {called}", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8")
    except NotImplementedError:
        sys.exit("error: JAX has no CUDA plugin here: pip install -e '.[gpu,mosaic]'")
    devices = topology.devices
    one = NamedSharding(jax.sharding.Mesh(devices[:1], ("data",)), PartitionSpec())
    cudnn = "jax._src.cudnn.fused_attention_stablehlo."
    with (
        mock.patch("jax.extend.backend.get_default_device", Gpu),
        mock.patch(cudnn + "check_cudnn_version", lambda: 91000),
        mock.patch(cudnn + "check_compute_capability", lambda _: True),
        mock.patch(cudnn + "is_cuda_compute_capability_equal", lambda _: False),
    ):
        for channels in (256, 128):
            for kernel in KERNELS:
                report(f"row, {channels} channels", kernel, compile_row(kernel, channels, one))
        for axes in MESHES:
            name = " ".join(f"{axis}={size}" for axis, size in axes.items())
            for kernel in KERNELS:
                report(f"step, {name}", kernel, compile_step(kernel, axes, devices))


if __name__ == "__main__":
    main()
