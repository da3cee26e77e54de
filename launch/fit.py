"""A config's mesh on the machines of a Job: which fields have to change, as --config flags.

A config names its devices. On others, `tensor` and `context` stay, weights are split over the remaining
devices of a slice, and slices hold copies. `batch_size` stays too: more or fewer parts are accumulated, so
that a device computes no more rows at once than the config says. Only a batch that cannot be shared out
evenly grows, to the next that can.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from neo_jax import config as config_lib
from neo_jax.errors import UserError
from neo_jax.hardware import Target

_FITTED = ("num_devices", "num_slices", "data", "fsdp")  # of config.mesh
_KEPT = ("tensor", "context")


def fields(spec: str, overrides: config_lib.Overrides, target: Target) -> tuple[tuple[str, str], ...]:
    """The --config fields, beside `overrides`, that make the config run on the target; () if it does already.

    Raises:
        UserError: the config is wrong, `tensor` * `context` does not divide a slice, or the overrides fix
            a mesh of another size.
    """
    names = [field.removeprefix("mesh.") for field, _ in overrides if field.startswith("mesh.")]
    if any(name in _FITTED for name in names):
        _check_fixed(config_lib.load(spec, overrides).mesh, target)
        return ()
    # `tensor` and `context` alone make no mesh of the config's size; they are put in with the rest.
    kept = {field: text for field, text in overrides if field in [f"mesh.{name}" for name in _KEPT]}
    config = config_lib.load(spec, [pair for pair in overrides if pair[0] not in kept])
    mesh = config.mesh
    if not kept and (mesh.num_devices, mesh.num_slices) == (target.num_devices, target.num_slices):
        return ()
    inner = math.prod(_whole(f"mesh.{name}", kept.get(f"mesh.{name}", str(mesh[name]))) for name in _KEPT)
    if target.slice.num_devices % inner:
        raise UserError(
            f"mesh.tensor * mesh.context = {inner} does not divide the {target.slice.num_devices} devices of "
            f"{target.slice.name}; change --config.mesh.tensor, --config.mesh.context or --topology"
        )
    fitted = ConfigDict(config.to_dict())
    fitted.mesh.num_devices, fitted.mesh.num_slices = target.num_devices, target.num_slices
    fitted.mesh.data, fitted.mesh.fsdp = target.num_slices, target.slice.num_devices // inner
    for name in config.stages:
        _fit_stage(fitted.stage[name], mesh.data * mesh.fsdp, fitted.mesh.data * fitted.mesh.fsdp)
    changed = _changes(config, fitted)
    config_lib.load(spec, (*overrides, *changed))  # the whole must still be a config
    return changed


def _check_fixed(mesh: Any, target: Target) -> None:
    """The user has given a mesh. Raises UserError if the target has another size."""
    if (mesh.num_devices, mesh.num_slices) != (target.num_devices, target.num_slices):
        raise UserError(
            f"--config.mesh: {mesh.num_devices} devices in {mesh.num_slices} slice(s), but {target.name} has "
            f"{target.num_devices} in {target.num_slices}; change it, or leave "
            f"{', '.join(f'mesh.{name}' for name in _FITTED)} out to have them fitted"
        )


def _whole(field: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--config.{field}={text}: must be a positive whole number")
    return int(text)


def shared_out(batch_size: int, shards: int) -> int:
    """The batch size, or the next that `shards` groups of devices can share evenly."""
    return shards * max(1, math.ceil(batch_size / shards))


def _fit_stage(stage: ConfigDict, old_shards: int, shards: int) -> None:
    """Sets batch_size and accumulate of a stage whose batch is now split over `shards` groups of devices."""
    rows_at_once = max(1, stage.batch_size // (old_shards * stage.accumulate))
    stage.batch_size = shared_out(stage.batch_size, shards)
    rows = stage.batch_size // shards  # of a device, in one step
    stage.accumulate = next(
        parts for parts in range(1, rows + 1) if rows % parts == 0 and rows <= parts * rows_at_once
    )


def _changes(old: Any, new: Any) -> tuple[tuple[str, str], ...]:
    """Dotted names and new values of the fields that `fields` may have set."""
    names = [f"mesh.{name}" for name in _FITTED]
    names += [f"stage.{stage}.{field}" for stage in old.stages for field in ("batch_size", "accumulate")]
    pairs = []
    for name in names:
        before, after = old, new
        for key in name.split("."):
            before, after = before[key], after[key]
        if before != after:
            pairs.append((name, str(after)))
    return tuple(pairs)
