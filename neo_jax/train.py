"""Trains a model: the run, top to bottom.

    python -m neo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command again goes on where the last checkpoint left off. Exit codes: see errors.py.
"""

from neo_jax import errors

if __name__ == "__main__":
    errors.end_at_sigterm()  # also while the rest is imported, which takes seconds

import argparse
import dataclasses
import gc
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import rejects as rejects_lib
from data_pipelines.dataset import open_data
from data_pipelines.loader import AnyLoader, merge_states, train_loader
from neo_jax import (
    allocator,
    checkpoint as checkpoint_lib,
    config as config_lib,
    distributed,
    emergency,
    events,
    flops,
    mesh as mesh_lib,
    objectives,
    params as params_lib,
    stages as stages_lib,
    start,
    step as step_lib,
    workdir as workdir_lib,
    xla_options,
)
from neo_jax.checkpoint import Checkpoints
from neo_jax.distributed import Group
from neo_jax.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_OK, UserError, main_guard
from neo_jax.events import Events
from neo_jax.heldout import held_out_loss
from neo_jax.interrupt import Interrupt, Interrupted
from neo_jax.metrics import MetricsWriter, NoWriter, Progress
from neo_jax.model.transformer import Transformer
from neo_jax.stages import Stage
from neo_jax.step import TrainState
from neo_jax.steplog import Seen, StepLog
from neo_jax.watch import Watch

T = TypeVar("T")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of this run")
    parser.add_argument(
        "--allow_data_change", action="store_true", help="resume although the data is not the checkpoint's"
    )
    args = config_lib.parse_args(parser, argv)
    allocator.keep_freed_memory()
    # Tracing makes many objects: looking through those of all modules each time took a seventh of the start.
    gc.freeze()
    gc.set_threshold(20_000)
    return train(config_lib.load(args.config, args.overrides), args.workdir, args.allow_data_change)


def train(config: ConfigDict, workdir: pathlib.Path, allow_data_change: bool = False) -> int:
    """Takes all steps of a resolved config that are not yet taken; returns the exit code."""
    with ThreadPoolExecutor(1) as thread:  # this one sees signals while it waits for the other processes
        group = thread.submit(distributed.start, config.mesh).result()
    limits = config.train
    with (
        Watch(group, limits.silence_timeout_s, limits.start_timeout_s) as watch,
        Interrupt(watch) as interrupt,
    ):
        code = take_steps(config, workdir, allow_data_change, group, watch, interrupt)
        group.barrier("end", limits.hang_timeout_s)  # process 0 must not be gone before the others
    if interrupt.abandoned:
        distributed.leave(code)
    return code


def take_steps(
    config: ConfigDict,
    workdir: pathlib.Path,
    allow_data_change: bool,
    group: Group,
    watch: Watch,
    interrupt: Interrupt,
) -> int:
    """As `train`, of one process among those of the group."""
    mesh = mesh_lib.make(config.mesh)
    print(group.describe(mesh), flush=True)
    with group.in_turn("workdir and data", config.train.start_timeout_s):
        if not group.leads:
            workdir_lib.check_shared(workdir, group.told("run"))
        workdir_lib.claim(workdir, config)
        if group.leads:
            group.tell("run", workdir_lib.run_id(workdir))
        workdir_lib.check_writable(workdir)
        if (workdir / "checkpoints" / "0").exists():  # no run writes one before its first step
            raise UserError(
                f"--workdir={workdir} holds a model, but no run; start one in another folder with "
                f"--config.init={workdir}"
            )
        data_hash = open_data(config.data).data_hash
    xla_options.keep_programs(workdir / "compiled", jax.default_backend())

    model = objectives.build(config)
    specs = params_lib.abstract(model)
    stages = stages_lib.plan(config)
    trainable = {stage.name: params_lib.select(specs, stage.config.trainable) for stage in stages}
    if group.leads:
        print(f"{params_lib.count(specs):,} parameters on {mesh.size} {jax.default_backend()} device(s)")

    with (
        Events(workdir if group.leads else None) as log_events,
        emergency.open_checkpoints(config.train, workdir, mesh) as checkpoints,
        jax.set_mesh(mesh),
    ):
        branch = pathlib.Path(config.branch) if config.branch and not checkpoints.latest else None
        step = checkpoints.latest if branch is None else start.branch_step(branch, stages[-1].end)
        log_events.doing(events.START, step)
        stage = stages_lib.at(stages, step)
        record = None
        if step:
            log_events.doing(events.RESTORE, step)
            like = start.abstract_state(mesh, specs, stage, trainable[stage.name])
            if branch is None:
                state, record = checkpoints.restore(step, like)
            else:
                state, record = checkpoint_lib.load(branch, like)
            if record["data_hash"] != data_hash and not allow_data_change:
                raise UserError(
                    f"checkpoint {step} is of data {record['data_hash']}, but the config names "
                    f"{data_hash}: bring the old data back, or pass --allow_data_change"
                )
        else:
            params = start.grown_params(config, mesh, specs) if config.init else None
            state = start.initial_state(config.seed, mesh, specs, stage, trainable[stage.name], params)
        with (
            MetricsWriter(workdir, step) if group.leads else NoWriter() as writer,
            Progress(step, stages[-1].end, shown=group.leads) as progress,
        ):
            peak = flops.peak(config.model.dtype) * mesh.size
            run = Run(
                config,
                mesh,
                model,
                specs,
                stages,
                data_hash,
                peak,
                checkpoints,
                writer,
                progress,
                interrupt,
                watch,
                log_events,
                evaluated=record is None or record.get("evaluated", True),
            )
            step, state, code = run.stage(stage, trainable[stage.name], step, state, record)
            for following in stages[stage.index + 1 :]:
                if code is None:
                    state = run.enter(following, trainable[following.name], state)
                    step, state, code = run.stage(following, trainable[following.name], step, state, None)
    assert code is not None, "the last stage gives one"
    return code


@dataclasses.dataclass
class Run:
    """What the loop needs at hand."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    model: Transformer
    specs: dict[str, params_lib.ParamSpec]
    stages: tuple[Stage, ...]
    data_hash: str
    peak_flops: float
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    interrupt: Interrupt
    watch: Watch
    events: Events
    evaluated: bool  # False: a signal broke off an evaluation that is due
    seen: Seen = dataclasses.field(default_factory=dict)  # totals since the run's first step

    def doing(self, kind: str, step: int, limit_s: float | None = None, again: bool = False) -> None:
        """Says what goes on from now, to the watch and to the log of events."""
        self.watch.progress(f"{kind}, step {step}", limit_s or self.config.train.hang_timeout_s)
        self.events.doing(kind, step, again)

    def prepare(self, what: str, step: int, work: Callable[[], T]) -> T:
        """What all processes must have done before any goes on, such as compiling. Raises Interrupted."""
        limit_s = self.config.train.start_timeout_s
        self.doing(events.COMPILE, step, limit_s)

        def in_mesh() -> T:  # the mesh in use belongs to a thread
            with jax.set_mesh(self.mesh):
                return work()

        result = self.interrupt.patiently(in_mesh)
        self.interrupt.together(f"{what} at step {step}", limit_s)
        return result

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

        def next_batch() -> dict[str, jax.Array]:
            return mesh_lib.put_batch(self.mesh, next(loader))

        def compile_with_first_batch() -> tuple[dict[str, jax.Array], jax.stages.Compiled]:
            batch = next_batch()
            return batch, train_step.lower(state, batch).compile()

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
        program = None
        while True:
            at_end = step == stage.end
            due = step > first and (at_end or (train.eval_every and step % train.eval_every == 0))
            if due or not self.evaluated:
                log.flush()
                with log.paused():
                    self.evaluate(step, state)
            if at_end and step < self.progress.total:
                return step, state, None  # the next stage saves this step, with its own optimizer state
            due = step == stage.start or step % train.save_every == 0 or step in train.keep_steps
            due = at_end or (step > 0 and due)
            self.checkpoints.poll()
            due_locally = bool(train.local_folder) and step > 0 and step % train.local_every == 0
            stop = self.interrupt.poll(self.mesh)
            if due or due_locally or stop:
                log.flush()
                self.doing(events.SAVE, step)
                with log.paused():
                    self.save(stage, step, state, loader, log, lasting=due or stop)
            if at_end:
                self.checkpoints.wait()
                return step, state, EXIT_OK
            if stop:
                self.checkpoints.wait()
                self.progress.say(
                    f"{self.interrupt.reason}: saved step {step}; run the same command to go on"
                )
                return step, state, EXIT_INTERRUPTED
            if program is None:
                try:
                    with log.paused():
                        batch, program = self.prepare("first batch and step", step, compile_with_first_batch)
                except Interrupted:
                    self.checkpoints.wait()
                    self.progress.say(
                        f"{self.interrupt.reason}: nothing new since step {step}; the same command goes on"
                    )
                    return step, state, EXIT_INTERRUPTED
            else:
                with log.waiting():
                    batch = next_batch()
            self.doing(events.TRAIN, step, again=step % train.log_every == 0)
            state, metrics = program(state, batch)
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

    def save(
        self, stage: Stage, step: int, state: TrainState, loader: AnyLoader, log: StepLog, lasting: bool
    ) -> None:
        record = {
            "stage": stage.name,
            "loader": merge_states(mesh_lib.gather(loader.get_state())),
            "rejected": log.rejected,
            "seen": dict(self.seen),
            "evaluated": self.evaluated,
            "data_hash": self.data_hash,
            "config_hash": config_lib.config_hash(self.config),
        }
        self.checkpoints.save(step, state, record, lasting)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Logs the held-out losses, in rows of the stage that took the last step."""
        if not self.config.eval.splits or self.interrupt.agreed:
            return
        stage = stages_lib.at(self.stages, step - 1)
        self.doing(events.EVAL, step)

        def compiling(work: Callable[[], T]) -> T:
            program = self.prepare("held-out loss", step, work)
            self.doing(events.EVAL, step)
            return program

        def after_batch() -> None:
            self.doing(events.EVAL, step)
            if self.interrupt.poll(self.mesh):
                raise Interrupted

        self.evaluated = False
        try:
            held_out = {
                split: held_out_loss(
                    self.config,
                    stage.config,
                    self.model,
                    state.params,
                    split,
                    self.mesh,
                    compiling,
                    after_batch,
                )
                for split in self.config.eval.splits
            }
        except Interrupted:
            return
        self.evaluated = True
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
