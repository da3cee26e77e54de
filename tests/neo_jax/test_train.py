"""The training command as a user runs it: exact resume, signals, and what it says when something is wrong."""

import functools
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from data_pipelines.errors import DataError
from neo_jax import allocator, distributed, mesh as mesh_lib, metrics, train
from neo_jax.checkpoint import list_arrays
from neo_jax.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_OK, EXIT_USER_ERROR, UserError

ROOT = Path(__file__).parents[2]
STEPS = 12
# Programs as users have them, not as conftest.py has them compiled for tests: a resumed run must equal these.
QUICK_TO_COMPILE = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in QUICK_TO_COMPILE}


@pytest.fixture(scope="module")
def command(quickstart_data):
    """Function workdir, overrides -> argv of a short run with both stages and frequent saves."""

    def make(workdir, *overrides):
        fields = {
            "data.path": quickstart_data.data.path,
            "stage.align.batch_size": 2,
            "stage.full.batch_size": 2,
            "stage.align.steps": 4,
            "stage.align.warmup_steps": 2,
            "stage.full.warmup_steps": 2,
            "stage.full.steps": STEPS - 4,
            "stage.full.schedule": "wsd",
            "stage.full.cooldown_share": 0.5,
            "train.save_every": 3,
            "train.log_every": 1,
            "eval.splits": "dev",
        }
        config = f"--config={ROOT}/configs/quickstart.py:smoke"
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return [sys.executable, "-m", "neo_jax.train", config, f"--workdir={workdir}", *flags, *overrides]

    return make


def run(argv):
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory):
    """The workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert run(command(workdir)).returncode == EXIT_OK
    return workdir


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of it, to write into."""
    return shutil.copytree(straight, tmp_path / "run")


def logged(workdir):
    """What was logged, without wall-clock figures."""
    return [
        {k: v for k, v in line.items() if k != "perf"} for line in metrics.read(workdir / "metrics.jsonl")
    ]


def checkpoint(workdir):
    """(arrays, JSON record) of the newest checkpoint, read without model code."""
    from orbax.checkpoint import v1 as ocp

    folder = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    state = ocp.load_checkpointables(folder)["state"]
    return folder.name, state, ocp.checkpointables_metadata(folder).custom_metadata


def wait_for_step(workdir, step, process):
    """Until a step is logged."""
    while not any(line["step"] >= step for line in metrics.read(workdir / "metrics.jsonl")):
        assert process.poll() is None, "the run ended early"
        time.sleep(0.05)


def assert_same_run(workdir, other):
    assert logged(workdir) == logged(other)
    (step, state, record), (other_step, other_state, other_record) = checkpoint(workdir), checkpoint(other)
    assert step == other_step == str(STEPS)
    assert record == other_record
    jax.tree.map(np.testing.assert_array_equal, state, other_state)


def test_killed_twice_and_resumed_equals_straight(command, straight, tmp_path):
    killed = tmp_path / "killed"
    assert [line["step"] for line in logged(straight) if "loss" in line] == list(range(1, STEPS + 1))
    for step in sorted(random.sample(range(2, STEPS), 2)):
        process = subprocess.Popen(
            command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        wait_for_step(killed, step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = run(command(killed))
    assert finished.returncode == EXIT_OK, finished.stderr
    assert_same_run(straight, killed)
    # Once done, the same command has nothing to do and changes nothing.
    again = run(command(killed))
    assert again.returncode == EXIT_OK, again.stderr
    assert_same_run(straight, killed)


def test_a_branch_equals_a_run_of_its_own(command, straight, refused_here, tmp_path):
    """A shorter run that starts from a longer one's checkpoint, before either cools down, is the same run."""
    longer = ("--config.stage.full.steps=14", "--config.train.keep_steps=8,5")  # cools down from step 11
    assert run(command(tmp_path / "trunk", *longer)).returncode == EXIT_OK
    kept = {path.name for path in (tmp_path / "trunk/checkpoints").iterdir()}
    assert kept == {"5", "8", "15", "18"}
    branch = f"--config.branch={tmp_path}/trunk/checkpoints/8"
    assert run(command(tmp_path / "branch", branch)).returncode == EXIT_OK
    assert logged(tmp_path / "branch") == [line for line in logged(straight) if line["step"] > 8]
    states = [checkpoint(workdir) for workdir in (tmp_path / "branch", straight)]
    assert states[0][2].pop("config_hash") != states[1][2].pop("config_hash")
    assert states[0][2] == states[1][2]
    jax.tree.map(np.testing.assert_array_equal, states[0][1], states[1][1])
    message = refused_here(command(tmp_path / "late", f"--config.branch={tmp_path}/trunk/checkpoints/15"))
    assert "is not before the end of this run, step 12" in message
    message = refused_here(command(tmp_path / "none", f"--config.branch={tmp_path}/trunk"))
    assert "name a folder DIR/checkpoints/STEP" in message


def test_totals_are_those_of_all_steps(smoke_workdir):
    """`seen` in the last line against the lines themselves, which are of every fifth step."""
    lines = [line for line in metrics.read(smoke_workdir / "metrics.jsonl") if "loss" in line]
    last = lines[-1]
    assert last["seen"]["visual_tokens"] == pytest.approx(last["patches"] * last["step"], rel=0.1)
    assert last["seen"]["tokens"] == pytest.approx(last["tokens"] * last["step"], rel=0.1)
    totals = [line["seen"] for line in lines]
    sources = [name for name in totals[0] if name.startswith("tokens/")]
    for name in set(totals[0]) - set(sources):
        assert all(a[name] < b[name] for a, b in itertools.pairwise(totals))
    assert len(sources) > 1
    assert all(sum(seen[name] for name in sources) == seen["tokens"] for seen in totals)


def test_sigterm_saves_and_the_same_command_goes_on(command, tmp_path):
    process = subprocess.Popen(
        command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    wait_for_step(tmp_path, 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED
    saved, _, _ = checkpoint(tmp_path)
    assert re.match(
        r"process 0 of 1 on .* \(1 host in all\): 1 of 1 cpu devices, mesh data=1 .* rows\n", output
    )
    assert f"SIGTERM: saved step {saved}; run the same command to go on" in output
    assert not any(line["step"] > int(saved) for line in logged(tmp_path))
    resumed = run(command(tmp_path))
    assert resumed.returncode == EXIT_OK
    assert f"goes on at step {saved}" in resumed.stdout
    assert [line["step"] for line in logged(tmp_path) if "loss" in line] == list(range(1, STEPS + 1))


def handles_sigterm(process):
    """As process 1 of a container gets no other signals."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return int(caught[1], 16) >> (signal.SIGTERM - 1) & 1


def test_sigterm_while_modules_are_imported_ends_the_run(command, tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "run"), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    while not handles_sigterm(process):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (
        EXIT_INTERRUPTED,
        "SIGTERM: nothing begun; the same command goes on\n",
    )
    assert not (tmp_path / "run").exists()


def test_sigterm_while_joining_the_others_ends_the_run(command, tmp_path):
    """Process 0, which coordinates, takes the call and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        names = (distributed.NUM_PROCESSES, distributed.COORDINATOR, distributed.PROCESS_ID)
        values = ("2", f"127.0.0.1:{silent.getsockname()[1]}", "1")
        process = subprocess.Popen(
            command(tmp_path / "run"), cwd=ROOT, env=ENVIRONMENT | dict(zip(names, values, strict=True))
        )
        silent.settimeout(120)
        silent.accept()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == EXIT_INTERRUPTED


def test_workdir_says_what_it_is(smoke_workdir):
    names = {path.name for path in smoke_workdir.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "tensorboard"} <= names
    record = json.loads((smoke_workdir / "config.json").read_text())
    assert {"config", "config_hash", "versions", "git_revision"} <= set(record)
    last = [line for line in metrics.read(smoke_workdir / "metrics.jsonl") if "loss" in line][-1]
    assert set(last["source_loss"]) == {"fluent", "noto", "openmoji", "twemoji"}
    assert 0 <= last["padding_share"] < 0.5 and last["perf"]["mfu"] > 0
    newest = max((smoke_workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    listed = list_arrays(newest)
    assert "params/patch_embed/patch/weight (192, 32) float32" in listed
    [file] = (smoke_workdir / "tensorboard").iterdir()
    events = EventFileLoader(str(file)).Load()
    charts = {(event.step, value.tag): value for event in events for value in event.summary.value}
    assert charts[last["step"], "loss"].tensor.float_val[0] == np.float32(last["loss"])


def test_training_imports_neither_torch_nor_tensorflow():
    """They are installed for conversion; some libraries take them along if they find them."""
    code = "import sys, neo_jax.train; print({'torch', 'tensorflow', 'transformers'} & set(sys.modules))"
    assert run([sys.executable, "-c", code]).stdout == "set()\n"


def test_smoke_run_learns(smoke_workdir):
    losses = [line["loss"] for line in metrics.read(smoke_workdir / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.5


def refused(argv):
    """The one line of an error that ends with exit code 1."""
    result = run(argv)
    assert result.returncode == EXIT_USER_ERROR, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.fixture
def refused_here(monkeypatch):
    """As `refused`, without the seconds that a process takes to start: argv -> what `main` raises."""
    # JAX runs already, with more devices than a command has; and freed memory is given back as before.
    monkeypatch.setattr(distributed, "start", lambda mesh: distributed.Group(0, 1, "here"))
    monkeypatch.setattr(mesh_lib, "make", functools.partial(mesh_lib.make, devices=jax.devices()[:1]))
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)

    def refused_here(argv):
        with pytest.raises((UserError, DataError)) as error:
            train.main(argv[3:])
        return str(error.value)

    return refused_here


def test_workdir_of_another_config_is_refused_with_the_difference(command, smoke_workdir):
    before = (smoke_workdir / "config.json").read_bytes()
    message = refused(command(smoke_workdir, "--config.model.num_layers=4"))
    assert "holds a run of another config" in message and "model.num_layers: 3 -> 4" in message
    assert (smoke_workdir / "config.json").read_bytes() == before


def test_workdir_that_is_a_file(command, refused_here, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in refused_here(command(tmp_path / "file"))


def test_unwritable_workdir(command, refused_here):
    """Inside a folder that even root cannot write to."""
    assert "--workdir=/proc/neo_jax cannot be made" in refused_here(command("/proc/neo_jax"))


def test_pattern_that_matches_nothing_is_refused(command, refused_here, tmp_path):
    message = refused_here(command(tmp_path / "run", "--config.stage.align.trainable=encoder/.*"))
    assert "'encoder/.*' matches no parameter" in message


def test_nan_loss_stops_past_the_limit(command, tmp_path):
    """A learning rate that overflows: the run ends with its own code and keeps its checkpoints."""
    argv = command(
        tmp_path,
        "--config.stage.full.peak_lr=1e38",
        "--config.train.max_nonfinite_steps=2",
        "--config.stage.full.steps=40",
    )
    result = run(argv)
    assert result.returncode == EXIT_NONFINITE, result.stdout + result.stderr
    assert "error: 3 steps had a non-finite loss or gradient" in result.stdout
    assert int(checkpoint(tmp_path)[0]) >= 4
    assert logged(tmp_path)[-1]["nonfinite_steps"] == 3


def test_damaged_checkpoint_is_named(command, finished):
    newest = max((finished / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in (newest / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:100])
    result = run(command(finished))  # Orbax's threads print, too, even into a line, so this is not `refused`
    assert result.returncode == EXIT_USER_ERROR
    told = f"error: cannot restore checkpoint {re.escape(str(newest))}.*delete that folder"
    assert len(re.findall(told, result.stderr)) == 1, result.stderr
    shutil.rmtree(newest)
    assert run(command(finished)).returncode == EXIT_OK


def test_other_data_is_refused_unless_allowed(command, finished):
    step, _, record = checkpoint(finished)
    path = finished / "checkpoints" / step / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace(record["data_hash"], "0" * 64))
    message = refused(command(finished))
    assert f"checkpoint {step} is of data {'0' * 64}, but" in message and "--allow_data_change" in message
    assert run(command(finished, "--allow_data_change")).returncode == EXIT_OK


def test_truncated_shard_is_named(command, refused_here, quickstart_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(quickstart_data.data.path, data)
    shard = next((data / "train").glob("noto-*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    message = refused_here(command(tmp_path / "run", f"--config.data.path={data}"))
    assert shard.name in message


def test_full_disk_keeps_the_checkpoints_before_it(command, tmp_path):
    """On a file system of 8 MB, in a mount namespace of its own, one checkpoint fits and two do not."""
    script = f"""
        mount -t tmpfs -o size=8m tmpfs {tmp_path} || exit 99
        {shlex.join(command(tmp_path / "run"))}
        echo "exit code $?"
        ls {tmp_path}/run/checkpoints
        {sys.executable} -m neo_jax.checkpoint ls {tmp_path}/run/checkpoints/3
    """
    result = run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script])
    assert "exit code 1" in result.stdout, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "saving checkpoint" in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    assert "params/patch_embed/patch/weight (192, 32) float32" in result.stdout


def test_a_save_that_fails_stops_the_run_long_before_the_next_save(command, tmp_path):
    """Of the checkpoints of steps 3 and 6 one fits into their folder; the next would be the last step's."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    fields = {"stage.full.steps": 400, "train.save_every": 1000, "train.keep_steps": "3,6"}
    more = [f"--config.{name}={value}" for name, value in fields.items()]
    script = f"""
        mount -t tmpfs -o size=8m tmpfs {folder} || exit 99
        {shlex.join(command(tmp_path / "run", *more))}
        echo "exit code $?"
    """
    result = run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script])
    assert "exit code 1" in result.stdout, result.stdout + result.stderr
    assert "error: saving checkpoint" in result.stderr and "/6 failed" in result.stderr, result.stderr
    assert 6 <= logged(tmp_path / "run")[-1]["step"] < 200


def test_checkpoint_folder_that_cannot_be_written_is_told_before_the_first_step(command, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    script = f"""
        mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} || exit 99
        {shlex.join(command(tmp_path / "run"))}
        echo "exit code $?"
    """
    result = run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script])
    assert "exit code 1" in result.stdout, result.stdout + result.stderr
    message = f"error: {folder}: no checkpoint can be written there: Read-only file system"
    assert result.stderr.splitlines() == [message]
    assert logged(tmp_path / "run") == []


def test_checkpoint_folder_that_turns_read_only_keeps_the_checkpoints_before(command, tmp_path):
    """A mount of its own, in a namespace of its own, is made read-only once it holds a checkpoint."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    script = f"""
        mount --bind {folder} {folder} || exit 99
        {shlex.join(command(tmp_path / "run"))} &
        until [ -d {folder}/3 ]; do kill -0 $! || exit 98; sleep 0.02; done
        until mount -o remount,bind,ro {folder} 2>/dev/null; do sleep 0.02; done
        wait $!
        echo "exit code $?"
        for step in $(ls {folder}); do
            {sys.executable} -m neo_jax.checkpoint ls {folder}/$step || echo damaged $step
        done
    """
    result = run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script])
    assert "exit code 1" in result.stdout, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "saving checkpoint" in errors[0] and "Read-only" in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    assert "damaged" not in result.stdout
    assert "params/patch_embed/patch/weight (192, 32) float32" in result.stdout
