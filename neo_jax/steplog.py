"""From the metrics that a step returns to the line that is logged."""

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines import rejects as rejects_lib
from data_pipelines.rejects import Rejected
from neo_jax import flops, mesh as mesh_lib
from neo_jax.errors import UserError
from neo_jax.metrics import MetricsWriter, Progress
from neo_jax.params import ParamSpec
from neo_jax.stages import Stage
from neo_jax.step import Metrics

SEEN = ("tokens", "visual_tokens", "supervised_tokens", "images", "documents")
# Totals of SEEN, "flops", and "tokens/SOURCE", since the run's first step, over all processes.
Seen = dict[str, float]


class StepLog:
    """Logs the steps of one stage, each one step late, so that reading its metrics never holds up the next.

    On CPUs a step is done when it returns (allocator.py), and is logged at once.

    Args:
        peak_flops: FLOP/s of all devices together, the yardstick of MFU.
        source_names: names of the entries of `source_loss`.
        step: the step the stage goes on from.
        rejected: records that earlier steps left out and no line has told of yet.
        seen: totals of the steps before; added to.
    """

    def __init__(
        self,
        config: ConfigDict,
        stage: Stage,
        specs: dict[str, ParamSpec],
        trainable: frozenset[str],
        source_names: Sequence[str],
        peak_flops: float,
        writer: MetricsWriter,
        progress: Progress,
        step: int,
        rejected: rejects_lib.Counts,
        seen: Seen,
    ):
        self.config, self.stage, self.specs, self.trainable = config, stage, specs, trainable
        self.source_names, self.peak_flops = source_names, peak_flops
        self.writer, self.progress = writer, progress
        self.nonfinite_steps = 0
        self.rejected, self.seen = rejected, seen
        self._pending: tuple[int, Metrics, list[Rejected]] | None = None
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._from, self._began, self._waited = step, time.perf_counter(), 0.0
        self._tokens = self._images = self._flops = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of all speeds: it is not training."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def add(self, step: int, metrics: Metrics, rejects: list[Rejected]) -> None:
        """Takes the metrics of `step`, still being computed, and finishes those of the step before.

        `rejects` are the records that its batch left out, in this process.
        """
        self.flush()
        self._pending = (step, metrics, rejects)
        if jax.default_backend() == "cpu":
            self.flush()

    def flush(self) -> None:
        """Waits for the last step and logs it if it is due."""
        if self._pending is None:
            return
        (step, metrics, rejects), self._pending = self._pending, None
        self.rejected = rejects_lib.add(self.rejected, rejects_lib.count(rejects))
        values = jax.device_get(metrics)
        self.nonfinite_steps = int(values["nonfinite_steps"])
        if values["misrouted_tokens"]:
            raise UserError(
                f"step {step}: {values['misrouted_tokens']} tokens exceed their side of the cut at "
                f"model.route.visual_share={self.config.model.route.visual_share}; the packer must keep "
                "both budgets (neo_jax/model/route.py)"
            )
        self._tokens += float(values["tokens"])
        self._images += float(values["images"])
        step_flops = flops.train_flops(self.config.model, self.specs, self.trainable, values)
        self._flops += step_flops
        for name in SEEN:
            self.seen[name] = self.seen.get(name, 0) + int(values[name])
        for source, tokens in zip(self.source_names, values["source_tokens"], strict=True):
            self.seen[f"tokens/{source}"] = self.seen.get(f"tokens/{source}", 0) + int(tokens)
        self.seen["flops"] = self.seen.get("flops", 0.0) + step_flops
        too_many = self.nonfinite_steps > self.config.train.max_nonfinite_steps  # the run's last line says so
        if step % self.config.train.log_every == 0 or too_many:
            everywhere = mesh_lib.gather(self.rejected)
            line = self._line(step, values) | {"rejected": functools.reduce(rejects_lib.add, everywhere)}
            self.rejected = {}
            self.writer.write(line)
            self.progress.log(step, _summary(line))
            self._restart(step)

    def _line(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        stage = self.stage.config
        elapsed = time.perf_counter() - self._began
        losses = zip(self.source_names, values["source_loss"], values["source_weight"], strict=True)
        tokens, patches = int(values["tokens"]), int(values["patches"])
        return {
            "step": step,
            "stage": self.stage.name,
            "loss": float(values["loss"]),
            "source_loss": {name: float(loss / weight) for name, loss, weight in losses if weight > 0},
            "objectives": {name: float(loss) for name, loss in values["objectives"].items()},
            **busiest_experts(values),
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
            "seen": dict(self.seen),
            "perf": {
                "steps_per_s": (step - self._from) / elapsed,
                "tokens_per_s": self._tokens / elapsed,
                "images_per_s": self._images / elapsed,
                "mfu": self._flops / elapsed / self.peak_flops,
                "data_wait_share": self._waited / elapsed,
            },
        }


def busiest_experts(values: dict[str, Any]) -> dict[str, float]:
    """Share of a layer's choices that fell on its busiest learned expert: mean and maximum over layers."""
    if "expert_tokens" not in values:
        return {}
    tokens = values["expert_tokens"]  # [layers, E]
    busiest = tokens.max(axis=-1) / tokens.sum(axis=-1)
    return {"busiest_expert_share": float(busiest.mean()), "busiest_expert_share_max": float(busiest.max())}


def _summary(line: dict[str, Any]) -> str:
    perf = line["perf"]
    return (
        f"loss {line['loss']:.4f}  lr {line['lr']:.1e}  {perf['tokens_per_s']:,.0f} tokens/s  "
        f"{perf['images_per_s']:.0f} images/s  MFU {perf['mfu']:.0%}"
    )
