"""The device mesh, and one table that says how every array is split over it.

Axes: `data` and `fsdp` split rows, `fsdp` also weights, `tensor` splits heads and inner widths, `context`
splits the positions of a row. Across slices (groups of devices joined by the data-centre network only) it is
`data` that is split, as it needs the least traffic: one sum of gradients per step.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from neo_jax.errors import UserError
from neo_jax.params import ParamSpec

AXES = ("data", "fsdp", "tensor", "context")

# logical axis of an array -> mesh axis or axes it is split over; None = whole on every device
RULES: dict[str, str | tuple[str, ...] | None] = {
    # of parameters
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": None,  # each is split like a dense network: equal work wherever tokens go (model/experts.py)
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    "pixels": None,
    "vision": None,
    "positions": None,
    "slots": None,
    "teacher": None,
    # of batches and activations
    "batch": ("data", "fsdp"),
    "length": "context",
    "width": None,
}


def make(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of config.mesh over `devices`, by default all devices of this run.

    Raises:
        UserError: another number of devices, or of slices, than the config says.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) != config.num_devices:
        raise UserError(
            f"mesh.num_devices is {config.num_devices}, but this run has {len(devices)} "
            f"{devices[0].platform} devices; set mesh.num_devices and the mesh axes to match"
        )
    shape = tuple(config[axis] for axis in AXES)
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    simulated = devices[0].platform == "cpu"
    if slices != config.num_slices and not simulated:
        raise UserError(
            f"mesh.num_slices is {config.num_slices}, but the devices of this run are in {slices} slice(s)"
        )
    if config.num_slices == 1 or simulated:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    within = (shape[0] // config.num_slices, *shape[1:])
    across = (config.num_slices, 1, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=types)


def platform() -> str:
    """Of the devices of the mesh in use, which need not be attached (preflight), or else this run's."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def partition(axes: Sequence[str]) -> PartitionSpec:
    """How an array with these logical axes is split.

    Raises:
        ValueError: two of its axes map to the same mesh axis.
    """
    mapped = [RULES[axis] for axis in axes]
    used = [name for axis in mapped if axis is not None for name in _names(axis)]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} collide on mesh axes {mapped}; change one rule in mesh.RULES")
    return PartitionSpec(*mapped)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """`x`, with its split over the mesh in use fixed to the rules of its logical axes.

    Dimensions that the mesh does not divide stay whole; those without a name, at the end, are XLA's to split.
    Without a mesh, x itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    named = divisible(mesh, x.shape[: len(axes)], partition(axes))
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*named, *rest))


def divisible(mesh: Any, shape: Sequence[int], spec: PartitionSpec) -> PartitionSpec:
    """The split without the dimensions that their mesh axes do not divide."""
    sizes = (_size(mesh, axis) for axis in spec)
    return PartitionSpec(
        *(axis if dim % size == 0 else None for dim, axis, size in zip(shape, spec, sizes, strict=True))
    )


def param_shardings(mesh: Mesh, specs: Mapping[str, ParamSpec]) -> dict[str, NamedSharding]:
    """The sharding of every parameter.

    Raises:
        UserError: a dimension that its mesh axis does not divide.
    """
    shardings = {}
    for path, spec in specs.items():
        split = partition(spec.axes)
        for size, axis, logical in zip(spec.shape, split, spec.axes, strict=True):
            if size % _size(mesh, axis):
                raise UserError(
                    f"mesh.{axis}={_size(mesh, axis)} does not divide {path}, {logical!r} of size {size}"
                )
        shardings[path] = NamedSharding(mesh, split)
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every field of a batch is split: rows, then positions or patches."""
    return NamedSharding(mesh, partition(("batch", "length")))


@dataclasses.dataclass(frozen=True)
class Share:
    """Which rows of every batch a process loads: the part `index` of `count` equal parts."""

    index: int
    count: int
    leads: bool  # is the first of the processes that load this part


@functools.cache
def share(mesh: Mesh) -> Share:
    """The rows that this process loads.

    Processes whose devices hold the same rows, split along `tensor` or `context`, load the same.

    Raises:
        UserError: the rows of two processes overlap without being the same.
    """
    held: dict[int, set[int]] = {}
    for (data, fsdp, *_), device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(data * mesh.shape["fsdp"] + fsdp)
    parts = {process: tuple(sorted(rows)) for process, rows in held.items()}
    distinct = sorted(set(parts.values()))
    if (
        sum(map(len, distinct)) != mesh.shape["data"] * mesh.shape["fsdp"]
        or len(set(map(len, distinct))) != 1
    ):
        raise UserError(
            f"mesh: data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}, tensor={mesh.shape['tensor']} and "
            f"context={mesh.shape['context']} give {len(held)} processes rows that overlap in part; make "
            "tensor * context a divisor or a multiple of the devices of a process"
        )
    own = parts[jax.process_index()]
    first = min(process for process, part in parts.items() if part == own)
    return Share(distinct.index(own), len(distinct), first == jax.process_index())


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's share of a batch's rows, as global arrays split over the mesh."""
    sharding, parts = batch_sharding(mesh), share(mesh).count
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * parts, *x.shape[1:]))
        for name, x in batch.items()
    }


def gather(value: Any) -> list[Any]:
    """A JSON value of every process, in the order of the processes; all of them must call this."""
    if jax.process_count() == 1:
        return [value]
    own: np.ndarray = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(own)))
    padded: np.ndarray = np.zeros(sizes.max(), np.uint8)
    padded[: len(own)] = own
    everyone = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(one[:size])) for one, size in zip(everyone, sizes, strict=True)]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, specs: Mapping[str, ParamSpec], abstract_state: Any) -> Any:
    """Shardings of a train state: what is keyed by a parameter's path is split like it, the rest is whole."""
    by_path = param_shardings(mesh, specs)

    def sharding(keys: tuple, leaf: Any) -> NamedSharding:
        key = keys[-1] if keys else None
        return by_path.get(getattr(key, "key", ""), replicated(mesh))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def _size(mesh: Any, axis: str | tuple[str, ...] | None) -> int:
    """Number of parts that a mesh axis, or several together, split a dimension into."""
    size = 1
    for name in _names(axis):
        size *= mesh.shape[name]
    return size
