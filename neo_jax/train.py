"""Trains a model: the run, top to bottom.

    python -m neo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.FIELD=VALUE ...]

The same command again resumes where the last checkpoint left off. Exit codes: see errors.py.
"""

import argparse
import dataclasses
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from data_pipelines import build
from data_pipelines.loader import Loader, eval_batches, train_loader
from neo_jax import checkpoint, flops, mesh as mesh_lib, params as params_lib, stages as stages_lib, step as step_lib
from neo_jax import config as config_lib, workdir as workdir_lib
from neo_jax.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_OK, UserError, main_guard
from neo_jax.metrics import MetricsWriter, Progress
from neo_jax.model.transformer import Transformer


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.train", description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument(
        "--allow_data_change", action="store_true", help="resume although the data differs from the checkpoint's"
    )
    args = config_lib.parse_args(parser, argv)
    config = config_lib.load(args.config, args.overrides)
    return train(config, args.workdir, args.allow_data_change)


def train(config, workdir: pathlib.Path, allow_data_change: bool = False) -> int:
    """Runs every stage of a resolved config that is not yet done; returns the exit code."""
    workdir_lib.claim(workdir, config)
    manifest = build.ensure(config.data)

    mesh = start_devices(config)
    model = Transformer(config.model)
    specs = params_lib.abstract(model)
    stages = stages_lib.plan(config)
    trainable = {stage.name: params_lib.select(specs, stage.config.trainable) for stage in stages}
    print(f"{params_lib.count(specs):,} parameters, {mesh_lib.num_devices(mesh)} {jax.default_backend()} devices")

    with (
        Interrupt() as interrupt,
        checkpoint.Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints) as checkpoints,
        jax.set_mesh(mesh),
    ):
        start, state, position = restore(config, mesh, specs, stages, trainable, checkpoints)
        if start and position["data"] != manifest["data_hash"] and not allow_data_change:
            raise UserError(
                f"checkpoint {start} was trained on data {position['data']}, {config.data.path} now holds "
                f"{manifest['hash']}; bring the data back or pass --allow_data_change"
            )
        with MetricsWriter(workdir, start) as writer:
            run = Run(config, mesh, model, specs, manifest, checkpoints, writer, interrupt)
            return run.stages(stages, trainable, start, state, position)


def start_devices(config) -> jax.sharding.Mesh:
    """The mesh; on a CPU, of as many simulated devices as the config asks for."""
    if config.mesh.num_devices > 1:
        jax.config.update("jax_num_cpu_devices", config.mesh.num_devices)
    return mesh_lib.make(config.mesh)


def restore(config, mesh, specs, stages, trainable, checkpoints):
    """(steps taken, state on devices, JSON record) of the newest checkpoint, or of a fresh start."""
    step = checkpoints.steps[-1] if checkpoints.steps else 0
    stage = stages_lib.at(stages, step)
    key = jax.random.key(config.seed)

    def fresh():
        return step_lib.initial_state(params_lib.init(specs, key), specs, stage, trainable[stage.name])

    shapes = jax.eval_shape(fresh)
    shardings = mesh_lib.state_shardings(mesh, specs, shapes)
    if not step:
        return 0, jax.jit(fresh, out_shardings=shardings)(), None
    abstract_state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )
    return step, checkpoints.restore(step, abstract_state), checkpoints.record(step)


@dataclasses.dataclass
class Run:
    """What the loop needs at hand. The order inside the loop is fixed: evaluate, save, next batch, step, log."""

    config: config_lib.FrozenConfigDict
    mesh: jax.sharding.Mesh
    model: Transformer
    specs: dict[str, params_lib.ParamSpec]
    manifest: dict
    checkpoints: checkpoint.Checkpoints
    writer: MetricsWriter
    interrupt: "Interrupt"

    def stages(self, stages, trainable, step: int, state: step_lib.TrainState, position) -> int:
        """Runs all stages from `step` on; returns the exit code."""
        self.peak = flops.measured_peak(self.config.model.dtype) * mesh_lib.num_devices(self.mesh)
        self.progress = Progress(step, stages[-1].end)
        if position is not None:
            self.progress.say(f"resuming at step {step}")
        try:
            for stage in stages[stages_lib.at(stages, step).index :]:
                if step == stage.start and stage.index:
                    state = self.enter(stage, trainable[stage.name], state)
                    position = None
                with train_loader(self.config, stage.config, seed=data_seed(self.config.seed, stage)) as loader:
                    if position is not None and step < stage.end:
                        loader.set_state(position["loader"])
                    step, state, code = self.stage(stage, trainable[stage.name], loader, step, state)
                if code is not None:
                    return code
            raise AssertionError("the last stage returns an exit code")
        finally:
            self.progress.close()

    def enter(self, stage, trainable, state):
        def fresh(state):
            return step_lib.enter_stage(state, self.specs, stage, trainable)

        shardings = mesh_lib.state_shardings(self.mesh, self.specs, jax.eval_shape(fresh, state))
        return jax.jit(fresh, out_shardings=shardings)(state)

    def stage(self, stage, trainable, loader: Loader, step: int, state):
        """Takes the stage's remaining steps. Returns (step, state, exit code or None to go on)."""
        config, train = self.config, self.config.train
        num_sources = len(loader.source_names)
        train_step = jax.jit(
            step_lib.make_train_step(self.model, self.specs, stage, trainable, num_sources), donate_argnums=0
        )
        count = params_lib.count({path: self.specs[path] for path in trainable})
        self.progress.say(f"stage {stage.name}: steps {stage.start} to {stage.end}, {count:,} trainable parameters")
        log = StepLog(self, stage, trainable, loader.source_names, step)
        first = step
        while True:
            at_end = step == stage.end
            if step > first and (at_end or (train.eval_every and step % train.eval_every == 0)):
                log.flush()
                self.evaluate(stage, step, state, num_sources)
            if at_end and step < self.progress.total:
                return step, state, None  # the next stage saves this step, with its own optimizer state
            if at_end or (step and (step == stage.start or step % train.save_every == 0)) or self.interrupt.asked:
                log.flush()
                self.save(stage, step, state, loader)
            if at_end or self.interrupt.asked:
                self.checkpoints.wait()
            if at_end:
                return step, state, EXIT_OK
            if self.interrupt.asked:
                self.progress.say(f"stopped by {self.interrupt.asked} at step {step}, saved; run again to go on")
                return step, state, EXIT_INTERRUPTED
            with log.waiting():
                batch = mesh_lib.put_batch(self.mesh, next(loader))
            state, metrics = train_step(state, batch)
            step += 1
            self.progress.step()
            log.add(step, metrics)
            if log.nonfinite_steps > train.max_nonfinite_steps:
                self.progress.say(
                    f"error: {log.nonfinite_steps} steps had a non-finite loss or gradient, more than "
                    f"train.max_nonfinite_steps={train.max_nonfinite_steps}; lower stage.{stage.name}.peak_lr "
                    f"(the last checkpoint is of step {(self.checkpoints.steps or ['none'])[-1]})"
                )
                return step, state, EXIT_NONFINITE

    def save(self, stage, step: int, state, loader: Loader) -> None:
        self.checkpoints.save(
            step,
            state,
            {
                "stage": stage.name,
                "loader": loader.get_state(),
                "data": self.manifest["data_hash"],
                "config_hash": config_lib.config_hash(self.config),
            },
        )

    def evaluate(self, stage, step: int, state, num_sources: int) -> None:
        losses = {
            split: held_out_loss(self.config, stage.config, self.model, state.params, split, num_sources, self.mesh)
            for split in self.config.eval.splits
        }
        self.writer.write({"step": step, "eval": losses})
        self.progress.say(f"step {step}  held-out loss  " + "  ".join(f"{k} {v:.4f}" for k, v in losses.items()))


def held_out_loss(config, stage, model, params, split: str, num_sources: int, mesh) -> float:
    """sum(ce * w) / sum(w) over a whole split."""
    eval_step = jax.jit(step_lib.make_eval_step(model, num_sources))
    loss = weight = 0.0
    for batch in eval_batches(config, stage, split):
        sums = eval_step(params, mesh_lib.put_batch(mesh, batch))
        loss, weight = loss + float(sums["loss"]), weight + float(sums["weight"])
    return loss / weight


class StepLog:
    """Turns the metrics of a step into a line, one step late, so that reading them never stops the device."""

    def __init__(self, run: Run, stage, trainable, source_names, step: int):
        self.run, self.stage, self.trainable, self.source_names = run, stage, trainable, source_names
        self.nonfinite_steps = 0
        self._pending: tuple[int, step_lib.Metrics] | None = None
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._since, self._waited, self._counts, self._from = time.perf_counter(), 0.0, {}, step

    def waiting(self):
        """Context in which time counts as waiting for data."""
        return _Stopwatch(self)

    def add(self, step: int, metrics: step_lib.Metrics) -> None:
        """Takes a step's metrics, still being computed, and finishes those of the step before."""
        ready, self._pending = self._pending, (step, metrics)
        if ready is not None:
            self._finish(*ready)

    def flush(self) -> None:
        ready, self._pending = self._pending, None
        if ready is not None:
            self._finish(*ready)

    def _finish(self, step: int, metrics: step_lib.Metrics) -> None:
        values = jax.device_get(metrics)
        self.nonfinite_steps = int(values["nonfinite_steps"])
        spent = flops.train_flops(self.run.config.model, self.run.specs, self.trainable, values)
        counts = {"tokens": float(values["tokens"]), "images": float(values["images"]), "flops": spent}
        self._counts = {name: self._counts.get(name, 0.0) + value for name, value in counts.items()}
        if step % self.run.config.train.log_every == 0:
            line = self._line(step, values)
            self.run.writer.write(line)
            perf = line["perf"]
            self.run.progress.log(
                step,
                f"loss {line['loss']:.4f}  lr {line['lr']:.1e}  {perf['tokens_per_s']:,.0f} tokens/s  "
                f"{perf['images_per_s']:.0f} images/s  MFU {perf['mfu']:.0%}",
            )
            self._restart(step)

    def _line(self, step: int, values) -> dict:
        stage = self.stage.config
        elapsed = time.perf_counter() - self._since
        sources = {
            name: float(loss / weight)
            for name, loss, weight in zip(
                self.source_names, values["source_loss"], values["source_weight"], strict=True
            )
            if weight > 0
        }
        tokens, patches = int(values["tokens"]), int(values["patches"])
        return {
            "step": step,
            "stage": self.stage.name,
            "loss": float(values["loss"]),
            "source_loss": sources,
            "grad_norm": float(values["grad_norm"]),
            "lr": float(values["lr"]),
            "tokens": tokens,
            "supervised_tokens": int(values["supervised_tokens"]),
            "patches": patches,
            "images": int(values["images"]),
            "documents": int(values["documents"]),
            "padding_share": 1 - tokens / (stage.batch_size * stage.row_tokens),
            "patch_padding_share": 1 - patches / (stage.batch_size * stage.row_patches),
            "nonfinite_steps": self.nonfinite_steps,
            "perf": {
                "steps_per_s": (step - self._from) / elapsed,
                "tokens_per_s": self._counts["tokens"] / elapsed,
                "images_per_s": self._counts["images"] / elapsed,
                "mfu": self._counts["flops"] / elapsed / self.run.peak,
                "data_wait_share": self._waited / elapsed,
            },
        }


class _Stopwatch:
    def __init__(self, log: StepLog):
        self.log = log

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *exc_info):
        self.log._waited += time.perf_counter() - self.began


class Interrupt:
    """Context that turns the first SIGINT or SIGTERM into a request to save and stop; the second one kills."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.asked: str | None = None

    def _handle(self, number, frame):
        self.asked = signal.Signals(number).name
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc_info):
        self._restore()


def data_seed(seed: int, stage) -> int:
    """The seed of a stage's data order and augmentation."""
    return int(np.random.SeedSequence([seed, stage.index]).generate_state(1)[0])


if __name__ == "__main__":
    main_guard(main)
