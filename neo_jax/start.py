"""Where a run starts: at fresh parameters, at those of another model, or at a checkpoint."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from neo_jax import (
    grow,
    mesh as mesh_lib,
    params as params_lib,
    restore,
    step as step_lib,
    workdir as workdir_lib,
    xla_options,
)
from neo_jax.errors import UserError
from neo_jax.stages import Stage
from neo_jax.step import TrainState

Specs = Mapping[str, params_lib.ParamSpec]


def abstract_state(mesh: Mesh, specs: Specs, stage: Stage, trainable: frozenset[str]) -> Any:
    """Shapes, dtypes and shardings of the train state in a stage: what a checkpoint is restored into."""

    def make() -> TrainState:
        return step_lib.initial_state(params_lib.init(specs, jax.random.key(0)), specs, stage, trainable)

    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        mesh_lib.state_shardings(mesh, specs, shapes),
    )


def initial_state(
    seed: int,
    mesh: Mesh,
    specs: Specs,
    stage: Stage,
    trainable: frozenset[str],
    params: params_lib.Params | None = None,
) -> TrainState:
    """Fresh parameters (or those given, which are used up) and optimizer state, made where they live."""

    def make(params: params_lib.Params | None) -> TrainState:
        fresh = params_lib.init(specs, jax.random.key(seed)) if params is None else params
        return step_lib.initial_state(fresh, specs, stage, trainable)

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(mesh, specs, stage, trainable))
    options = xla_options.once(mesh)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0, compiler_options=options)(params)


def grown_params(config: ConfigDict, mesh: Mesh, specs: Specs) -> params_lib.Params:
    """The parameters that config.init gives this model (grow.py).

    Raises:
        UserError: the folder has no checkpoint, or one of a model that does not fit.
    """
    folder = pathlib.Path(config.init)
    try:
        grow.check_config(workdir_lib.load_config(folder).model, config.model)
        checkpoint = restore.checkpoint_folder(folder)
        shapes = restore.param_shapes(checkpoint)
        origins = grow.plan(shapes, specs)
    except UserError as error:
        raise UserError(f"config.init: {error}") from error
    replicated = mesh_lib.replicated(mesh)
    shardings = mesh_lib.param_shardings(mesh, specs)
    # What keeps its name and shape goes where it will live; the rest is whole on every device for a moment.
    base, _ = restore.load_params(
        checkpoint,
        {
            path: jax.ShapeDtypeStruct(
                shape,
                np.float32,
                sharding=shardings[path] if path in specs and specs[path].shape == shape else replicated,
            )
            for path, shape in shapes.items()
        },
    )
    fresh = sorted(path for path, origin in origins.items() if origin.source is None)
    if jax.process_index() == 0:
        print(f"starts from {checkpoint}" + (f"; freshly drawn: {', '.join(fresh)}" if fresh else ""))
    make = jax.jit(
        lambda base: grow.grow(origins, specs, base, jax.random.key(config.seed)), out_shardings=shardings
    )
    return make(base)


def branch_step(checkpoint: pathlib.Path, end: int) -> int:
    """The step of the checkpoint that config.branch names, in a run of `end` steps."""
    if not checkpoint.name.isdigit() or not checkpoint.is_dir():
        raise UserError(f"config.branch: {checkpoint} is no checkpoint; name a folder DIR/checkpoints/STEP")
    if (step := int(checkpoint.name)) >= end:
        raise UserError(f"config.branch: {checkpoint} is not before the end of this run, step {end}")
    return step
