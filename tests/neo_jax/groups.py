"""Starting groups of processes for tests, and reading what their runs left."""

import sys
import time
from pathlib import Path

from launch import local
from neo_jax import metrics
from neo_jax.errors import EXIT_OK

ROOT = Path(__file__).parents[2]


def start(command, count, log, more=None):
    """A group of processes, their output in a file; `more` are arguments of single ones."""
    commands = local.processes(command, count, local.free_port())
    commands = [(argv + (more or {}).get(index, []), env) for index, (argv, env) in enumerate(commands)]
    return local.Processes(commands, log.open("a"))


def finish(group, log, timeout_s=300):
    """The exit code of a group and its output."""
    return group.wait(log.open("a"), timeout_s), log.read_text()


def run(command, count, log):
    with start(command, count, log) as group:
        code, output = finish(group, log)
    assert code == EXIT_OK, output
    return output


def train(workdir, data, count, steps, *overrides):
    """argv of a tiny run of one stage, its mesh over `count` devices."""
    fields = {
        "data.path": data.data.path,
        "stages": "full",
        "stage.full.steps": steps,
        "stage.full.warmup_steps": 2,
        "model.num_layers": 1,
        "model.pre_buffer": 0,
        "train.save_every": 2,
        "train.log_every": 1,
        "train.keep_checkpoints": 10,
        "eval.splits": "dev",
        "mesh.num_devices": count,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config={ROOT}/configs/quickstart.py:smoke"
    return [sys.executable, "-m", "neo_jax.train", config, f"--workdir={workdir}", *flags, *overrides]


def member_command(*arguments):
    return [sys.executable, "-m", "tests.neo_jax.member", *map(str, arguments)]


def checkpoints(workdir):
    """Steps of the whole checkpoints of a run."""
    folder = workdir / "checkpoints"
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []
    )


def wait_until(condition, group, log, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert all(process.poll() is None for process in group.running), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def losses(workdir):
    lines = metrics.read(workdir / "metrics.jsonl")
    return {
        (line["step"], key): line[key] if key == "loss" else line["eval"]["dev"]
        for line in lines
        for key in ("loss", "eval")
        if key in line
    }


def read_rows(workdir):
    """What every step's batch held: counts, which must not depend on processes at all."""
    keys = ("tokens", "patches", "images", "documents", "supervised_tokens")
    return {
        line["step"]: [line[key] for key in keys]
        for line in metrics.read(workdir / "metrics.jsonl")
        if "loss" in line
    }
