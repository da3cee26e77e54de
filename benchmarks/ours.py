"""Our train step, compiled and run as neo_jax.train does it, on one batch."""

from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from neo_jax import (
    allocator,
    mesh as mesh_lib,
    objectives,
    params as params_lib,
    stages as stages_lib,
    start,
    step as step_lib,
    xla_options,
)


class Trainer:
    """The first stage of a resolved config; call `step` with a batch on its mesh.

    `state` None = fresh parameters.
    """

    def __init__(self, config: ConfigDict | FrozenConfigDict, state: step_lib.TrainState | None = None):
        allocator.keep_freed_memory()
        devices = jax.devices()[: config.mesh.num_devices]
        self.config, self.mesh = config, mesh_lib.make(config.mesh, devices)
        self.model = objectives.build(config)
        self.specs = params_lib.abstract(self.model)
        self.stage = stages_lib.plan(config)[0]
        self.trainable = params_lib.select(self.specs, self.stage.config.trainable)
        with jax.set_mesh(self.mesh):
            self.state = state or start.initial_state(
                config.seed, self.mesh, self.specs, self.stage, self.trainable
            )
        self.compiled: jax.stages.Compiled | None = None

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return mesh_lib.put_batch(self.mesh, batch)

    def compile(self, batch: Mapping[str, jax.Array]) -> jax.stages.Compiled:
        """The program for batches of this shape, state donated."""
        with jax.set_mesh(self.mesh):
            function = step_lib.make_train_step(self.model, self.specs, self.stage, self.trainable, 1)
            lowered = jax.jit(function, donate_argnums=0).lower(self.state, batch)
            self.compiled = lowered.compile(compiler_options=xla_options.of(self.mesh))
        return self.compiled

    def step(self, batch: Mapping[str, jax.Array]) -> float:
        """Takes one step, waits for it and returns its loss."""
        if self.compiled is None:
            self.compile(batch)
        self.state, metrics = self.compiled(self.state, batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])
