"""What XLA is told, by platform, in training and preflight alike, and where the programs it made are kept."""

import pathlib

import jax

from neo_jax import hardware

OPTIONS: dict[str, dict[str, str]] = {
    # Products with a gathered weight are not cut into one piece per device: the pieces would be added up
    # in bfloat16, through memory. The weight is gathered whole instead, while other work goes on.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}

# The SparseCores gather weights while the tensor cores multiply; the same numbers arrive. Left to itself
# libtpu has the tensor cores wait, and where a group covers all of the torus it gathers by all-reduces of
# twice the bytes.
SPARSE_CORES_GATHER: dict[str, str] = {
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}

# By chip, on top of those by platform.
CHIP_OPTIONS: dict[str, dict[str, str]] = {"v5p": SPARSE_CORES_GATHER}

# Drawing small parameters takes far longer to compile than to run: a quarter as long without optimisations.
ONCE: dict[str, dict[str, str]] = {"cpu": {"xla_backend_optimization_level": "0"}}


def of(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """For programs that run on the mesh's devices, attached or not."""
    device = mesh.devices.flat[0]
    chip = hardware.of_device(device.device_kind)
    return OPTIONS.get(device.platform, {}) | CHIP_OPTIONS.get(chip.name if chip else "", {})


def once(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """For programs that run a single time, at the start."""
    return ONCE.get(mesh.devices.flat[0].platform, {})


def keep_programs(folder: pathlib.Path, platform: str) -> None:
    """A restarted run takes its programs from `folder` (JAX's persistent compilation cache).

    Does nothing where JAX_COMPILATION_CACHE_DIR names a folder already, nor on CPUs: on many of them JAX
    refuses what it kept, at some length (its issue 38445).
    """
    if platform != "cpu" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
