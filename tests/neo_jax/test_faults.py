"""What goes wrong in a run, done to real processes with real signals: how all end, and what is left."""

import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from neo_jax import events, metrics
from neo_jax.errors import EXIT_HANG, EXIT_INTERRUPTED, EXIT_USER_ERROR
from tests.neo_jax.groups import (
    ROOT,
    checkpoints,
    finish,
    member_command,
    run,
    start,
    train,
    wait_until,
)

STEPS = 24
SILENCE_S = 8.0


def pair(workdir, data, *overrides):
    """argv of a run of two processes, whose silence is noticed soon; it evaluates nothing."""
    fields = (
        f"--config.train.silence_timeout_s={SILENCE_S}",
        "--config.train.save_every=8",
        "--config.eval.splits=",
    )
    return train(workdir, data, 2, STEPS, "--config.mesh.data=2", *fields, *overrides)


def logged(workdir):
    """What was logged, without wall-clock figures."""
    return [
        {k: v for k, v in line.items() if k != "perf"} for line in metrics.read(workdir / "metrics.jsonl")
    ]


def at_step(workdir, step):
    return lambda: any(line["step"] >= step for line in metrics.read(workdir / "metrics.jsonl"))


def doing(workdir, kind):
    return lambda: any(event["doing"] == kind for event in events.read(workdir))


def codes(group):
    return [process.returncode for process in group.running]


@pytest.fixture(scope="module")
def straight(quickstart_data, tmp_path_factory):
    """The workdir of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    run(pair(folder / "run", quickstart_data), 2, folder / "log")
    return folder / "run"


def arrays(workdir):
    """The arrays of the last checkpoint, whole, whatever processes saved them."""
    folder = workdir / "checkpoints" / str(STEPS)
    tree = ocp.checkpointables_metadata(folder).metadata["state"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
    return ocp.load_checkpointables(folder, {"state": like})["state"]


def assert_same_run(workdir, other):
    assert logged(workdir) == logged(other)
    jax.tree.map(np.testing.assert_array_equal, arrays(workdir), arrays(other))


def test_sigterm_to_one_saves_one_step_of_all_and_resume_is_exact(straight, quickstart_data, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    argv = pair(workdir, quickstart_data)
    with start(argv, 2, log) as group:
        wait_until(at_step(workdir, 3), group, log)
        group.running[1].send_signal(signal.SIGTERM)
        code, output = finish(group, log)
    assert code == EXIT_INTERRUPTED and codes(group) == [EXIT_INTERRUPTED] * 2, output
    saved = checkpoints(workdir)[-1]
    assert f"[0] signal to another process: saved step {saved}; run the same command to go on" in output
    assert 3 <= saved < STEPS and logged(workdir)[-1]["step"] == saved
    assert f"goes on at step {saved}" in run(argv, 2, tmp_path / "again")
    assert_same_run(workdir, straight)


def test_sigterm_to_one_while_it_compiles_ends_all(quickstart_data, tmp_path):
    """Nobody waits for a program that will not be used."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    with start(pair(workdir, quickstart_data), 2, log) as group:
        wait_until(doing(workdir, events.COMPILE), group, log)  # says process 0
        group.running[0].send_signal(signal.SIGTERM)
        code, output = finish(group, log)
    assert code == EXIT_INTERRUPTED and codes(group) == [EXIT_INTERRUPTED] * 2, output
    assert "SIGTERM: nothing new since step 0" in output
    assert checkpoints(workdir) == [] and logged(workdir) == []


def test_sigterm_while_evaluating_saves_and_the_evaluation_is_made_up_for(quickstart_data, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    argv = train(workdir, quickstart_data, 1, 6, "--config.train.eval_every=2", "--config.train.save_every=4")
    with start(argv, 1, log) as group:
        wait_until(doing(workdir, events.EVAL), group, log)
        group.running[0].send_signal(signal.SIGTERM)
        code, output = finish(group, log)
    assert code == EXIT_INTERRUPTED, output
    assert "SIGTERM: saved step 2" in output
    assert checkpoints(workdir) == [2] and not any("eval" in line for line in logged(workdir))
    run(argv, 1, tmp_path / "again")
    assert [line["step"] for line in logged(workdir) if "eval" in line] == [2, 4, 6]
    assert [line["step"] for line in logged(workdir) if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_process_that_dies_or_stops_is_named_by_the_others(quickstart_data, tmp_path, number):
    workdir, log = tmp_path / "run", tmp_path / "log"
    with start(pair(workdir, quickstart_data, f"--config.stage.full.steps={10**6}"), 2, log) as group:
        wait_until(at_step(workdir, 3), group, log)
        group.running[1].send_signal(number)
        assert group.running[0].wait(timeout=120) == EXIT_HANG
        group.running[1].send_signal(signal.SIGKILL)
        _, output = finish(group, log)
    named = [line for line in output.splitlines() if "error: process 1 on " in line]
    assert len(named) == 1 and named[0].startswith("[0] "), output
    assert f"has given no sign of life for {SILENCE_S:g} s" in named[0]


@pytest.mark.slow
def test_process_0_stopped_is_named_by_the_others(quickstart_data, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    with start(pair(workdir, quickstart_data, f"--config.stage.full.steps={10**6}"), 2, log) as group:
        wait_until(at_step(workdir, 3), group, log)
        group.running[0].send_signal(signal.SIGSTOP)
        assert group.running[1].wait(timeout=120) == EXIT_HANG
        group.running[0].send_signal(signal.SIGKILL)
        _, output = finish(group, log)
    assert "[1] error: process 0, which coordinates, has not answered for" in output


@pytest.mark.slow
def test_process_0_killed_ends_the_others(quickstart_data, tmp_path):
    """JAX's own runtime aborts them at once; the launcher says which process it was."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    with start(pair(workdir, quickstart_data, f"--config.stage.full.steps={10**6}"), 2, log) as group:
        wait_until(at_step(workdir, 3), group, log)
        group.running[0].send_signal(signal.SIGKILL)
        code, output = finish(group, log)
    assert code == 128 + signal.SIGKILL and group.running[1].returncode == -signal.SIGABRT
    assert "process 0 was killed by SIGKILL" in output and "the leader task was preempted/died" in output


def test_mistake_seen_by_one_process_ends_all(quickstart_data, tmp_path):
    """It has another config than the others."""
    log = tmp_path / "log"
    argv = pair(tmp_path / "run", quickstart_data)
    with start(argv, 2, log, {1: [f"--config.data.path={tmp_path}", "--config.data.recipe="]}) as group:
        code, output = finish(group, log)
    assert code == EXIT_USER_ERROR and codes(group) == [EXIT_USER_ERROR] * 2, output
    assert any("[0] error: process 1 on " in line and "failed: " in line for line in output.splitlines())
    assert "Traceback" not in output


def test_workdir_that_is_not_shared_is_told(quickstart_data, tmp_path):
    """A folder of the same name on every host is another folder on each, as here the second process's."""
    log = tmp_path / "log"
    argv = pair(tmp_path / "run", quickstart_data)
    with start(argv, 2, log, {1: [f"--workdir={tmp_path}/other"]}) as group:
        code, output = finish(group, log)
    assert code == EXIT_USER_ERROR and codes(group) == [EXIT_USER_ERROR] * 2, output
    assert f"[1] error: --workdir={tmp_path}/other is not shared: what process 0 wrote" in output
    assert not (tmp_path / "other").exists() and checkpoints(tmp_path / "run") == []


def test_barrier_says_who_is_missing(tmp_path):
    output = run(member_command("barrier", tmp_path, "data=2"), 2, tmp_path / "log")
    assert "[0] process 0 waited 2 s at 'the meeting' for process 1: " in output


def test_hang_is_told_with_the_stacks_of_all_threads(quickstart_data, tmp_path):
    """The process that reads the data is stopped, so the next batch never comes."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    argv = train(
        workdir, quickstart_data, 1, 10**6, "--config.data.workers=1", "--config.train.hang_timeout_s=10"
    )
    with start(argv, 1, log) as group:
        wait_until(at_step(workdir, 2), group, log)
        parent = str(group.running[0].pid)
        pids = subprocess.run(["pgrep", "-P", parent], capture_output=True, text=True).stdout.split()
        subprocess.run(["kill", "-STOP", *pids], check=True)
        assert group.running[0].wait(timeout=120) == EXIT_HANG
        subprocess.run(["kill", "-KILL", *pids], check=True)
        _, output = finish(group, log)
    assert "has taken more than 10 s: a hang; the stacks of all threads are above" in output
    assert "Thread 0x" in output and "train.py" in output


@pytest.mark.slow
def test_full_disk_ends_all_processes_and_keeps_the_checkpoint_before(quickstart_data, tmp_path):
    """On a file system of 8 MB in a mount namespace of its own, one checkpoint fits and two do not."""
    argv = pair(
        tmp_path / "run", quickstart_data, "--config.train.save_every=3", "--config.model.num_layers=3"
    )
    runner = f"import sys; from launch import local; sys.exit(local.run({argv!r}, 2))"
    script = f"""
        mount -t tmpfs -o size=8m tmpfs {tmp_path} || exit 99
        {sys.executable} -c {shlex.quote(runner)}
        echo "exit code $?"
        {sys.executable} -m neo_jax.checkpoint ls {tmp_path}/run/checkpoints/3
    """
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = result.stdout + result.stderr
    assert f"exit code {EXIT_USER_ERROR}" in output, output
    assert "saving checkpoint" in output and "params/patch_embed/patch/weight" in output
