"""Named groups of XLA, libtpu and NCCL settings, by generation and number of slices.

A group is what AXLearn and MaxText (TPU) or JAX-Toolbox (GPU) publish for that hardware. Nothing here has
been measured on a pod by us: `none` is a group too, and a run records the group and its flags (workdir.py).

On a TPU all flags travel in LIBTPU_INIT_ARGS, on a GPU in XLA_FLAGS. Left out on purpose is what changes
numbers: xla_tpu_spmd_rng_bit_generator_unsafe, and all-reduce on the SparseCore, which changed losses.
"""

import dataclasses
from collections.abc import Mapping

from neo_jax.errors import UserError
from neo_jax.hardware import Chip, Target
from neo_jax.xla_options import SPARSE_CORES_GATHER

GROUP_VARIABLE = "NEO_JAX_FLAGS"  # environment variable that tells a run the name of its group
Flags = Mapping[str, str]

# Collectives run beside computation.
_LATENCY_HIDING: Flags = {
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    "xla_latency_hiding_scheduler_rerun": "2",
    "xla_enable_async_all_gather": "true",
}
# They do so in pieces that the tensor core merges with its own work: libtpu refuses that on all but v5e.
_ASYNC_FUSION: Flags = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
_VMEM_KIB = {"v5p": "65472", "v6e": "98304", "tpu7x": "65536"}
# Gradients are summed over the data-centre network while the backward pass goes on.
_MULTISLICE: Flags = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    "xla_tpu_enable_megascale_barrier": "true",
    "megascale_grpc_premap_memory_bytes": "17179869184",
    "megascale_graph_hang_threshold": "10m",
    "megascale_error_reporter_abort_on_hang": "true",
    "megascale_error_reporter_abort_on_error": "true",
}
# Programs run twice now and then, and the run stops where results differ.
_SDC: Flags = {
    "xla_tpu_enable_sdc_checker": "true",
    "xla_tpu_sdc_check_halt_on_detection": "true",
}
_GPU: Flags = {
    "xla_gpu_all_gather_combine_threshold_bytes": "1073741824",
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "1073741824",
    "xla_gpu_all_reduce_combine_threshold_bytes": "1073741824",
}
_BLACKWELL: Flags = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL"}

_TPU_ENV = {
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",  # a stalled read of Cloud Storage is tried again
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "256",
}
_GPU_ENV = {
    "JAX_OPTIMIZATION_LEVEL": "O1",  # latency hiding, pipelined collectives, their cost model
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    "NCCL_NVLS_ENABLE": "1",
}
_HOPPER_ENV = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # Blackwell is slower with it

GROUPS = ("default", "sparse_core", "sdc", "none")


@dataclasses.dataclass(frozen=True)
class Group:
    """A named set of flags, ready to be put into an environment."""

    name: str
    variable: str  # that carries the flags: LIBTPU_INIT_ARGS or XLA_FLAGS
    flags: Flags
    env: Mapping[str, str]

    @property
    def text(self) -> str:
        """Such as "--a=true --b=2"."""
        return " ".join(f"--{name}={value}" for name, value in self.flags.items())

    @property
    def environment(self) -> dict[str, str]:
        carried = {self.variable: self.text} if self.flags else {}
        return {GROUP_VARIABLE: self.name, **carried, **self.env}


def group(name: str, target: Target) -> Group:
    """The flags of that name for the target.

    Raises:
        UserError: no such group, or not for this generation.
    """
    if name not in GROUPS:
        raise UserError(f"--flags={name}: no such group; choose from {', '.join(GROUPS)}")
    chip = target.slice.chip
    variable = "LIBTPU_INIT_ARGS" if chip.platform == "tpu" else "XLA_FLAGS"
    if name == "none" or (name == "default" and chip.platform == "cpu"):
        return Group(name, variable, {}, {})
    if chip.platform != "tpu":
        return _gpu(name, chip)
    flags = dict(_LATENCY_HIDING)
    if chip.name == "v5e":
        flags.update(_ASYNC_FUSION)
    if chip.name in _VMEM_KIB:
        flags["xla_tpu_scoped_vmem_limit_kib"] = _VMEM_KIB[chip.name]
    if name == "sparse_core":
        if chip.name not in ("v6e", "tpu7x"):
            raise UserError(f"--flags=sparse_core: is for v6e and tpu7x; {chip.name} has the group default")
        flags.update(SPARSE_CORES_GATHER)  # on v5p they always do
    if name == "sdc":
        flags.update(_SDC)
    if target.num_slices > 1:
        flags.update(_MULTISLICE)
    return Group(name, variable, flags, _TPU_ENV)


def _gpu(name: str, chip: Chip) -> Group:
    if name != "default":
        raise UserError(f"--flags={name}: is for TPUs; {chip.name} has the groups default and none")
    if chip.name == "b200":
        return Group(name, "XLA_FLAGS", {**_GPU, **_BLACKWELL}, _GPU_ENV)
    return Group(name, "XLA_FLAGS", _GPU, {**_GPU_ENV, **_HOPPER_ENV})
