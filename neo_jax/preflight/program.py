"""The train step of a config, compiled for devices that are not attached.

The libtpu wheel holds the TPU compiler and runs on any x86 CPU: a topology is described by its name, and the
compiled program knows its memory, its schedule and its collectives.
"""

import dataclasses
import importlib.util
import math
import pathlib
import re
import resource
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from data_pipelines import schema
from neo_jax import (
    mesh as mesh_lib,
    objectives,
    params as params_lib,
    stages as stages_lib,
    step as step_lib,
    xla_options,
)
from neo_jax.errors import UserError
from neo_jax.hardware import Target
from neo_jax.stages import Stage
from neo_jax.start import abstract_state


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """The compiler found no schedule that fits."""

    needed: float  # bytes per device, as far as the compiler says
    message: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled train step and what it took to compile it."""

    text: str  # scheduled HLO of one device
    memory: dict[str, int]  # bytes per device: arguments, outputs, temporaries, aliased, host
    cost_flops: float  # XLA's own count, which sees every loop body once and no kernel
    lower_s: float
    compile_s: float
    host_bytes: int  # largest resident size of this process so far


def refit(config: FrozenConfigDict, stage_name: str, target: Target) -> FrozenConfigDict:
    """The config on the target's number of devices: `tensor`, `context` and rows per device stay as they are.

    Weights are split over all of a slice's other devices, and slices get whole copies.

    Raises:
        UserError: `tensor` * `context` does not divide a slice.
    """
    mesh, stage = config.mesh, config.stage[stage_name]
    if mesh.num_devices == target.num_devices and mesh.num_slices == target.num_slices:
        return config
    inner = mesh.tensor * mesh.context
    if target.slice.num_devices % inner:
        raise UserError(
            f"mesh.tensor * mesh.context = {inner} does not divide the {target.slice.num_devices} devices of "
            f"{target.slice.name}; change one of them"
        )
    rows = stage.batch_size // (mesh.data * mesh.fsdp)
    fitted = ConfigDict(config.to_dict())
    fsdp = target.slice.num_devices // inner
    fitted.mesh.update(
        num_devices=target.num_devices, num_slices=target.num_slices, data=target.num_slices, fsdp=fsdp
    )
    fitted.stage[stage_name].batch_size = rows * fsdp * target.num_slices
    return FrozenConfigDict(fitted)


def mesh_of(config: FrozenConfigDict, target: Target) -> Mesh:
    """The config's mesh over the target's devices.

    Raises:
        UserError: the compiler is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("preflight needs the TPU compiler, which runs on any CPU: pip install libtpu")
    chips = target.slice
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=chips.topology, num_slices=target.num_slices
        ).devices
    except Exception as error:  # jaxlib raises its own types
        raise UserError(f"topology {chips.name}: {str(error).splitlines()[0]}") from error
    return mesh_lib.make(config.mesh, devices)


def lower_step(config: FrozenConfigDict, stage_name: str, mesh: Mesh) -> jax.stages.Lowered:
    """The stage's train step as train.py has it: the state donated, and split afterwards as before."""
    model = objectives.build(config)
    specs = params_lib.abstract(model)
    stage = next(stage for stage in stages_lib.plan(config) if stage.name == stage_name)
    trainable = params_lib.select(specs, stage.config.trainable)
    with jax.set_mesh(mesh):
        step = step_lib.make_train_step(model, specs, stage, trainable, len(stage.config.mixture))
        state = abstract_state(mesh, specs, stage, trainable)
        shardings = jax.tree.map(lambda x: x.sharding, state), mesh_lib.replicated(mesh)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        return jitted.lower(state, abstract_batch(mesh, config, stage))


def compile_step(config: FrozenConfigDict, stage_name: str, mesh: Mesh) -> Program | OutOfMemory:
    """Compiles the stage's train step."""
    start = time.perf_counter()
    lowered = lower_step(config, stage_name, mesh)
    lowered_at = time.perf_counter()
    try:
        compiled, text = schedule(lowered, xla_options.of(mesh))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return OutOfMemory(_needed(str(error)), str(error))
    memory = compiled.memory_analysis()
    allocated = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    allocated += memory.temp_size_in_bytes
    return Program(
        text=text,
        memory={
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            # XLA's peak also counts what lies in the host's memory.
            "peak": min(memory.peak_memory_in_bytes, allocated),
            "host": memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        },
        cost_flops=float(compiled.cost_analysis().get("flops", 0.0)),
        lower_s=lowered_at - start,
        compile_s=time.perf_counter() - lowered_at,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def schedule(lowered: jax.stages.Lowered, options: dict[str, str]) -> tuple[jax.stages.Compiled, str]:
    """Compiles for a TPU, and returns the scheduled HLO of one device too.

    The compiler writes that down itself: JAX cannot read back all that newer ones do.
    """
    with tempfile.TemporaryDirectory(prefix="preflight-") as dump:
        dumping = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options={**dumping, **options})
        return compiled, next(pathlib.Path(dump).glob("*.after_optimizations.txt")).read_text()


def abstract_batch(mesh: Mesh, config: FrozenConfigDict, stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch of the stage."""
    embed, budget = config.model.embed, stage.config
    side = embed.patch_size * embed.merge_size
    shapes = schema.batch_shapes(budget.batch_size, budget.row_tokens, budget.row_patches, 3 * side**2)
    if objectives.active(budget, "distill"):
        features = (budget.batch_size, budget.row_patches, config.objectives.distill.teacher_size)
        shapes["teacher_features"] = features, np.dtype(np.float32)
    sharding = mesh_lib.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()
    }


def state_bytes(config: FrozenConfigDict, stage_name: str, mesh: Mesh) -> dict[str, int]:
    """Bytes per device of what a step keeps: parameters, and optimizer state of those that train."""
    specs = params_lib.abstract(objectives.build(config))
    stage = next(stage for stage in stages_lib.plan(config) if stage.name == stage_name)
    state = abstract_state(mesh, specs, stage, params_lib.select(specs, stage.config.trainable))

    def size(tree: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    return {"parameters": size(state.params), "optimizer": size(state.opt_state)}


def _needed(message: str) -> float:
    """The most bytes that the compiler names, as in "Used 19.8G of 15.75G hbm"; 0 where it names none."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = re.findall(r"(?:Used |\()([\d.]+)([KMGT])", message)
    return max((float(number) * units[unit] for number, unit in sizes), default=0.0)
