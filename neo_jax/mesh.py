"""The device mesh, and the one table from logical axes to mesh axes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from neo_jax.errors import UserError
from neo_jax.params import ParamSpec

AXES = ("data", "fsdp", "tensor", "context")

# logical axis of a parameter -> mesh axis it is split over; None = whole on every device
RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    "pixels": None,
    "vision": None,
    "positions": None,
    "slots": None,
    "teacher": None,
}
BATCH = PartitionSpec(("data", "fsdp"), "context")  # rows, then positions or patches


def make(config: ConfigDict) -> Mesh:
    """The mesh of config.mesh over all devices of this run.

    Raises:
        UserError: this run has another number of devices than the config says.
    """
    if jax.device_count() != config.num_devices:
        raise UserError(
            f"mesh.num_devices is {config.num_devices}, but this run has {jax.device_count()} "
            f"{jax.default_backend()} devices; set mesh.num_devices and the mesh axes to match"
        )
    shape = tuple(config[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def partition_spec(spec: ParamSpec) -> PartitionSpec:
    """How one parameter is split.

    Raises:
        ValueError: two of its axes map to the same mesh axis.
    """
    mapped = [RULES[axis] for axis in spec.axes]
    used = [axis for axis in mapped if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {spec.axes} collide on mesh axes {mapped}; change one rule in mesh.RULES")
    return PartitionSpec(*mapped)


def param_shardings(mesh: Mesh, specs: Mapping[str, ParamSpec]) -> dict[str, NamedSharding]:
    """The sharding of every parameter.

    Raises:
        UserError: a dimension that its mesh axis does not divide.
    """
    shardings = {}
    for path, spec in specs.items():
        partition = partition_spec(spec)
        for size, axis, logical in zip(spec.shape, partition, spec.axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide {path}, {logical!r} of size {size}"
                )
        shardings[path] = NamedSharding(mesh, partition)
    return shardings


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch, as global arrays split over the mesh."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, specs: Mapping[str, ParamSpec], abstract_state: Any) -> Any:
    """Shardings of a train state: what is keyed by a parameter's path is split like it, the rest is whole."""
    by_path = param_shardings(mesh, specs)

    def sharding(keys: tuple, leaf: Any) -> NamedSharding:
        key = keys[-1] if keys else None
        return by_path.get(getattr(key, "key", ""), replicated(mesh))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)
