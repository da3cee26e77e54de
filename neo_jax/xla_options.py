"""What XLA is told, by platform, in training and preflight alike, and where the programs it made are kept."""

import pathlib

import jax

OPTIONS: dict[str, dict[str, str]] = {
    # Products with a gathered weight are not cut into one piece per device: the pieces would be added up
    # in bfloat16, through memory. The weight is gathered whole instead, while other work goes on.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}

# Drawing small parameters takes far longer to compile than to run: a quarter as long without optimisations.
ONCE: dict[str, dict[str, str]] = {"cpu": {"xla_backend_optimization_level": "0"}}


def of(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """For programs that run on the mesh's devices, attached or not."""
    return OPTIONS.get(mesh.devices.flat[0].platform, {})


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
