"""What a workdir tells about its run, read once."""

import dataclasses
import json
import pathlib
from typing import Any

from ml_collections import FrozenConfigDict

from data_pipelines import build
from neo_jax import events, metrics, stages as stages_lib, workdir as workdir_lib
from neo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as the report needs it. `evaluation` and `samples` are empty before `neo_jax.evaluate`."""

    workdir: pathlib.Path
    config: FrozenConfigDict
    record: dict[str, Any]  # config.json: versions, revision, hashes
    manifest: dict[str, Any]  # of the data folder
    stages: tuple[stages_lib.Stage, ...]
    steps: list[dict[str, Any]]  # lines of metrics.jsonl about training steps
    losses: list[dict[str, Any]]  # its lines {"step", "eval": {split: loss}}
    evaluation: dict[str, Any]  # eval.json
    samples: dict[str, list[dict[str, Any]]]  # samples.json: per split id, source, label, tags, generated
    events: list[dict[str, Any]]  # lines of events.jsonl

    @property
    def last_step(self) -> int:
        return self.steps[-1]["step"]

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """The splits of eval.json, those of config.eval.splits first."""
        order = dict.fromkeys([*self.config.eval.splits, *self.evaluation])
        return {name: self.evaluation[name] for name in order if isinstance(self.evaluation.get(name), dict)}

    def spans(self) -> list[float]:
        """Seconds that each of `steps` stands for: the steps since the line before, at its rate."""
        seconds, before = [], 0
        for line in self.steps:
            seconds.append((line["step"] - before) / line["perf"]["steps_per_s"])
            before = line["step"]
        return seconds


def read(workdir: pathlib.Path) -> Run:
    """Reads a workdir and the manifest of its data.

    Raises:
        UserError: there is no run, no logged step yet, or a damaged file (named in the message).
        DataError: the data folder does not fit the config.
    """
    config = workdir_lib.load_config(workdir)
    lines = _read_metrics(workdir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise UserError(
            f"{workdir} has no logged step yet (metrics.jsonl is missing or empty); "
            f"train first: python -m neo_jax.train --config=... --workdir={workdir}"
        )
    return Run(
        workdir=workdir,
        config=config,
        record=_read_json(workdir / "config.json"),
        manifest=build.ensure(config.data),
        stages=stages_lib.plan(config),
        steps=steps,
        losses=[line for line in lines if "eval" in line],
        evaluation=_read_json(workdir / "eval.json") or {},
        samples=_read_json(workdir / "samples.json") or {},
        events=_read_metrics(workdir / events.FILE),
    )


def _read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        return metrics.read(path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete the bad line") from error


def _read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file, None where there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); run neo_jax.evaluate again") from error
