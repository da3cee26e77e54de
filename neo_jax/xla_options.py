"""Options of the XLA compiler, by platform, for training and preflight alike."""

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
