"""Trains a model: the run, top to bottom.

    python -m neo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command again goes on where the last checkpoint left off. Exit codes: see errors.py.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import rejects as rejects_lib
from data_pipelines.dataset import open_data
from data_pipelines.loader import AnyLoader, merge_states, train_loader
from neo_jax import (
    checkpoint as checkpoint_lib,
    config as config_lib,
    distributed,
    flops,
    grow,
    mesh as mesh_lib,
    objectives,
    params as params_lib,
    restore,
    stages as stages_lib,
    step as step_lib,
    workdir as workdir_lib,
    xla_options,
)
from neo_jax.checkpoint import Checkpoints
from neo_jax.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_OK, UserError, main_guard
from neo_jax.heldout import held_out_loss
from neo_jax.interrupt import Interrupt
from neo_jax.metrics import MetricsWriter, NoWriter, Progress
from neo_jax.model.transformer import Transformer
from neo_jax.stages import Stage
from neo_jax.step import TrainState
from neo_jax.steplog import Seen, StepLog


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of this run")
    parser.add_argument(
        "--allow_data_change", action="store_true", help="resume although the data is not the checkpoint's"
    )
    args = config_lib.parse_args(parser, argv)
    return train(config_lib.load(args.config, args.overrides), args.workdir, args.allow_data_change)


def train(config: ConfigDict, workdir: pathlib.Path, allow_data_change: bool = False) -> int:
    """Takes all steps of a resolved config that are not yet taken; returns the exit code."""
    group = distributed.start(config.mesh)
    mesh = mesh_lib.make(config.mesh)
    if group.count > 1:
        print(group.describe(mesh), flush=True)
    with group.in_turn("workdir and data", config.train.start_timeout_s):
        workdir_lib.claim(workdir, config)
        if (workdir / "checkpoints" / "0").exists():  # no run writes one before its first step
            raise UserError(
                f"--workdir={workdir} holds a model, but no run; start one in another folder with "
                f"--config.init={workdir}"
            )
        data_hash = open_data(config.data).data_hash

    model = objectives.build(config)
    specs = params_lib.abstract(model)
    stages = stages_lib.plan(config)
    trainable = {stage.name: params_lib.select(specs, stage.config.trainable) for stage in stages}
    if group.leads:
        print(f"{params_lib.count(specs):,} parameters on {mesh.size} {jax.default_backend()} device(s)")

    with (
        Interrupt() as interrupt,
        Checkpoints(
            workdir / "checkpoints", config.train.keep_checkpoints, config.train.keep_steps
        ) as checkpoints,
        jax.set_mesh(mesh),
    ):
        branch = pathlib.Path(config.branch) if config.branch and not checkpoints.latest else None
        step = checkpoints.latest if branch is None else branch_step(branch, stages[-1].end)
        stage = stages_lib.at(stages, step)
        params = None if step or not config.init else start_params(config, mesh, specs)
        state = initial_state(config.seed, mesh, specs, stage, trainable[stage.name], params)
        record = None
        if step:
            if branch is None:
                state, record = checkpoints.restore(step, state)
            else:
                state, record = checkpoint_lib.load(branch, state)
            if record["data_hash"] != data_hash and not allow_data_change:
                raise UserError(
                    f"checkpoint {step} is of data {record['data_hash']}, but the config names "
                    f"{data_hash}: bring the old data back, or pass --allow_data_change"
                )
        with (
            MetricsWriter(workdir, step) if group.leads else NoWriter() as writer,
            Progress(step, stages[-1].end, shown=group.leads) as progress,
        ):
            peak = flops.measured_peak(config.model.dtype) * mesh.size
            run = Run(config, mesh, model, specs, data_hash, peak, checkpoints, writer, progress, interrupt)
            step, state, code = run.stage(stage, trainable[stage.name], step, state, record)
            for following in stages[stage.index + 1 :]:
                if code is None:
                    state = run.enter(following, trainable[following.name], state)
                    step, state, code = run.stage(following, trainable[following.name], step, state, None)
    assert code is not None, "the last stage gives one"
    return code


def branch_step(checkpoint: pathlib.Path, end: int) -> int:
    """The step of the checkpoint that config.branch names, in a run of `end` steps."""
    if not checkpoint.name.isdigit() or not checkpoint.is_dir():
        raise UserError(f"config.branch: {checkpoint} is no checkpoint; name a folder DIR/checkpoints/STEP")
    if (step := int(checkpoint.name)) >= end:
        raise UserError(f"config.branch: {checkpoint} is not before the end of this run, step {end}")
    return step


def initial_state(
    seed: int,
    mesh: jax.sharding.Mesh,
    specs: dict[str, params_lib.ParamSpec],
    stage: Stage,
    trainable: frozenset[str],
    params: params_lib.Params | None = None,
) -> TrainState:
    """Fresh parameters (or those given, which are used up) and optimizer state, made where they live."""

    def make(params: params_lib.Params | None) -> TrainState:
        fresh = params_lib.init(specs, jax.random.key(seed)) if params is None else params
        return step_lib.initial_state(fresh, specs, stage, trainable)

    shardings = mesh_lib.state_shardings(mesh, specs, jax.eval_shape(make, params))
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def start_params(
    config: ConfigDict, mesh: jax.sharding.Mesh, specs: dict[str, params_lib.ParamSpec]
) -> params_lib.Params:
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


@dataclasses.dataclass
class Run:
    """What the loop needs at hand."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    model: Transformer
    specs: dict[str, params_lib.ParamSpec]
    data_hash: str
    peak_flops: float
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    interrupt: Interrupt
    seen: Seen = dataclasses.field(default_factory=dict)  # totals since the run's first step

    def enter(self, stage: Stage, trainable: frozenset[str], state: TrainState) -> TrainState:
        """The state at the start of a later stage: same parameters, fresh optimizer."""

        def enter(state: TrainState) -> TrainState:
            return step_lib.enter_stage(state, self.specs, stage, trainable)

        shardings = mesh_lib.state_shardings(self.mesh, self.specs, jax.eval_shape(enter, state))
        return jax.jit(enter, out_shardings=shardings)(state)

    def stage(
        self,
        stage: Stage,
        trainable: frozenset[str],
        step: int,
        state: TrainState,
        record: dict[str, Any] | None,
    ) -> tuple[int, TrainState, int | None]:
        """Takes the rest of a stage's steps, from a checkpoint's record if there is one.

        Returns (step, state, exit code, or None when another stage follows).
        """
        share = mesh_lib.share(self.mesh)
        with train_loader(
            self.config,
            stage.config,
            seed=data_seed(self.config.seed, stage),
            process_index=share.index,
            process_count=share.count,
        ) as loader:
            if record is not None and step < stage.end:
                loader.set_state(record["loader"])
            count = params_lib.count({path: self.specs[path] for path in trainable})
            verb = "starts" if record is None else f"goes on at step {step}"
            self.progress.say(
                f"stage {stage.name} {verb}: {count:,} trainable parameters, until step {stage.end}"
            )
            if record is not None:
                self.seen = dict(record["seen"])
            rejected = record.get("rejected", {}) if record is not None else {}
            return self.loop(stage, trainable, loader, step, state, rejected)

    def loop(
        self,
        stage: Stage,
        trainable: frozenset[str],
        loader: AnyLoader,
        step: int,
        state: TrainState,
        rejected: rejects_lib.Counts,
    ) -> tuple[int, TrainState, int | None]:
        """The order is fixed: evaluate, save, next batch, step, log."""
        train, first = self.config.train, step
        sources = loader.source_names
        leads_share = mesh_lib.share(self.mesh).leads
        shardings = jax.tree.map(lambda x: x.sharding, state)
        train_step = jax.jit(
            step_lib.make_train_step(self.model, self.specs, stage, trainable, len(sources)),
            donate_argnums=0,
            out_shardings=(shardings, mesh_lib.replicated(self.mesh)),  # every process reads the metrics
            compiler_options=xla_options.of(self.mesh),
        )
        log = StepLog(
            self.config,
            stage,
            self.specs,
            trainable,
            sources,
            self.peak_flops,
            self.writer,
            self.progress,
            step,
            rejected,
            self.seen,
        )
        while True:
            at_end = step == stage.end
            if step > first and (at_end or (train.eval_every and step % train.eval_every == 0)):
                log.flush()
                self.evaluate(stage, step, state)
            if at_end and step < self.progress.total:
                return step, state, None  # the next stage saves this step, with its own optimizer state
            due = at_end or (step and (step == stage.start or step % train.save_every == 0))
            due = due or step in train.keep_steps
            if due or self.interrupt.asked:
                log.flush()
                self.save(stage, step, state, loader, log)
            if at_end:
                self.checkpoints.wait()
                return step, state, EXIT_OK
            if self.interrupt.asked:
                self.checkpoints.wait()
                self.progress.say(f"{self.interrupt.asked}: saved step {step}; run the same command to go on")
                return step, state, EXIT_INTERRUPTED
            with log.waiting():
                batch = mesh_lib.put_batch(self.mesh, next(loader))
            state, metrics = train_step(state, batch)
            step += 1
            self.progress.step()
            rejects = loader.take_rejects()
            log.add(step, metrics, rejects if leads_share else [])
            if log.nonfinite_steps > train.max_nonfinite_steps:
                self.progress.say(
                    f"error: {log.nonfinite_steps} steps had a non-finite loss or gradient, above "
                    f"train.max_nonfinite_steps={train.max_nonfinite_steps}; lower "
                    f"stage.{stage.name}.peak_lr; the newest checkpoint is step {self.checkpoints.latest}"
                )
                return step, state, EXIT_NONFINITE

    def save(self, stage: Stage, step: int, state: TrainState, loader: AnyLoader, log: StepLog) -> None:
        record = {
            "stage": stage.name,
            "loader": merge_states(mesh_lib.gather(loader.get_state())),
            "rejected": log.rejected,
            "seen": dict(self.seen),
            "data_hash": self.data_hash,
            "config_hash": config_lib.config_hash(self.config),
        }
        self.checkpoints.save(step, state, record)

    def evaluate(self, stage: Stage, step: int, state: TrainState) -> None:
        if not self.config.eval.splits:
            return
        held_out = {
            split: held_out_loss(self.config, stage.config, self.model, state.params, split, self.mesh)
            for split in self.config.eval.splits
        }
        losses = {split: found.loss for split, found in held_out.items()}
        by_source = {split: found.sources for split, found in held_out.items()}
        self.writer.write({"step": step, "eval": losses, "eval_source": by_source, "seen": dict(self.seen)})
        shown = "  ".join(f"{split} {loss:.4f}" for split, loss in losses.items())
        self.progress.say(f"step {step}  held-out loss  {shown}")


def data_seed(seed: int, stage: Stage) -> int:
    """The seed of a stage's data order and augmentation."""
    return int(np.random.SeedSequence([seed, stage.index]).generate_state(1)[0])


if __name__ == "__main__":
    main_guard(main)
