"""Several processes as one run, for real: what they compute, load, save and restore."""

import signal

import jax
import numpy as np
import pytest

from data_pipelines.loader import train_loader
from neo_jax import config as config_lib, distributed, mesh as mesh_lib
from neo_jax.checkpoint import Checkpoints
from neo_jax.errors import UserError
from tests.neo_jax import member
from tests.neo_jax.groups import (
    ROOT,
    checkpoints,
    losses,
    member_command,
    read_rows,
    run,
    start,
    train,
    wait_until,
)

STEPS = 6


@pytest.fixture(scope="module")
def alone(quickstart_data, tmp_path_factory):
    """The workdir of a run of one process on one device."""
    folder = tmp_path_factory.mktemp("alone")
    run(train(folder / "run", quickstart_data, 1, STEPS), 1, folder / "log")
    return folder / "run"


def test_processes_train_as_one_and_go_on_in_another_number(alone, quickstart_data, tmp_path):
    """4 x 1 devices until step 2, 2 x 2 until step 4, then one: the losses of a run of one process."""
    workdir = tmp_path / "run"
    meshes = [(4, 2, ("data=4",)), (2, 4, ("data=2", "fsdp=2"))]
    for count, stop, axes in meshes:
        log = tmp_path / f"log{count}"
        axes = [f"--config.mesh.{axis}" for axis in axes]
        with start(train(workdir, quickstart_data, 4, STEPS, *axes), count, log) as group:
            wait_until(lambda stop=stop: stop in checkpoints(workdir), group, log)
            group.send(signal.SIGKILL)
        first = [line for line in log.read_text().splitlines() if " of every batch's rows" in line]
        assert len(first) == count, log.read_text()
        assert any(
            f"process 1 of {count} on" in line and f"loads part 2 of {count}" in line for line in first
        )
    output = run(train(workdir, quickstart_data, 1, STEPS), 1, tmp_path / "log")
    assert "goes on at step" in output
    assert read_rows(workdir) == read_rows(alone)
    assert losses(workdir).keys() == losses(alone).keys()
    for key, loss in losses(alone).items():
        np.testing.assert_allclose(losses(workdir)[key], loss, rtol=2e-5, err_msg=str(key))


def test_checkpoints_move_between_processes_and_meshes_to_the_bit(tmp_path):
    """4 x 1 -> 2 x 2 -> 1."""
    run(member_command("save", tmp_path / "steps", "data=2,fsdp=2"), 4, tmp_path / "log4")
    run(member_command("restore", tmp_path / "steps", "fsdp=2,tensor=2"), 2, tmp_path / "log2")
    mesh = jax.make_mesh((1, 1, 1, 1), mesh_lib.AXES, devices=jax.devices()[:1])
    with Checkpoints(tmp_path / "steps", keep=10) as saved:
        assert saved.latest == 2
        blank = {name: np.zeros(shape, np.float32) for name, shape in member.SHAPES.items()}
        restored, record = saved.restore(2, member.state(mesh, blank))
    assert record == {"saved by": 2}
    member.assert_holds(restored, member.values())


@pytest.mark.parametrize(
    ("axes", "count", "loaders"),
    [
        ("data=2", 2, 2),
        pytest.param("data=2,tensor=2", 4, 2, marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2", 4, 4, marks=pytest.mark.slow),
        pytest.param("data=1,context=2", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_each_process_loads_only_its_rows(quickstart_data, tmp_path, axes, count, loaders):
    """Its share of the rows of one process, once for every group of devices that holds the same rows."""
    run(member_command("rows", tmp_path, axes), count, tmp_path / "log")
    config = config_lib.load(
        f"{ROOT}/configs/quickstart.py:smoke", [("data.path", quickstart_data.data.path)]
    )
    with train_loader(config, config.stage.full, seed=3) as loader:
        whole = next(loader)
    rows = config.stage.full.batch_size // loaders
    held = np.load(tmp_path / "held.npz")
    for index in range(count):
        part = index * loaders // count
        loaded = np.load(tmp_path / f"rows-{index}.npz")
        for name, x in whole.items():
            np.testing.assert_array_equal(loaded[name], x[part * rows : (part + 1) * rows], err_msg=name)
            np.testing.assert_array_equal(held[name], x, err_msg=name)


def test_process_killed_while_saving_leaves_the_checkpoint_before(alone, quickstart_data, tmp_path):
    """Process 1 is killed once a later checkpoint has been begun; that one never becomes whole."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    argv = train(workdir, quickstart_data, 2, STEPS, "--config.mesh.data=2", "--config.train.save_every=1")
    begun = None
    with start(argv, 2, log) as group:
        wait_until(lambda: checkpoints(workdir), group, log)

        def unfinished():
            return [path for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]

        while begun is None:
            wait_until(unfinished, group, log)
            group.running[1].send_signal(signal.SIGSTOP)  # what it saves next cannot be finished without it
            (begun, *_) = [*unfinished(), None]
            if begun is None:  # this one was whole already
                group.running[1].send_signal(signal.SIGCONT)
        group.running[1].send_signal(signal.SIGKILL)
        group.running[1].wait()
    assert begun.exists() and not (begun.parent / begun.name.partition(".")[0]).exists()
    before = checkpoints(workdir)
    assert before and before[-1] == int(begun.name.partition(".")[0]) - 1
    run(argv, 2, tmp_path / "again")
    assert checkpoints(workdir)[: len(before)] == before
    assert read_rows(workdir) == read_rows(alone)
    for key, loss in losses(workdir).items():
        if key[1] == "loss":
            np.testing.assert_allclose(loss, losses(alone)[key], rtol=2e-5)


def refusal(environ):
    with pytest.raises(UserError) as error:
        distributed.start(config_lib.load(f"{ROOT}/configs/quickstart.py:smoke").mesh, environ)
    return str(error.value)


def test_environment_that_contradicts_itself_is_refused():
    given = {"NEO_JAX_NUM_PROCESSES": "2", "NEO_JAX_COORDINATOR": "localhost:1", "NEO_JAX_PROCESS_ID": "0"}
    assert "NEO_JAX_PROCESS_ID not" in refusal({k: given[k] for k in list(given)[:2]})
    assert "is not below NEO_JAX_NUM_PROCESSES=2" in refusal(given | {"NEO_JAX_PROCESS_ID": "2"})
    assert "expected host:port" in refusal(given | {"NEO_JAX_COORDINATOR": "localhost"})
    assert "expected a whole number" in refusal(given | {"NEO_JAX_PROCESS_ID": "one"})


def test_other_number_of_processes_than_the_launchers_is_refused():
    with pytest.raises(UserError, match="NEO_JAX_NUM_PROCESSES=2, but this run has 1 process"):
        distributed.check_count(1, {"NEO_JAX_NUM_PROCESSES": "2", "SLURM_NTASKS": "1"})
    # As in a batch script that forgot srun.
    with pytest.raises(UserError, match=r"SLURM_NTASKS=8, but this run has 1 process.*srun"):
        distributed.check_count(1, {"SLURM_NTASKS": "8"})
    distributed.check_count(1, {"NEO_JAX_NUM_PROCESSES": "1", "SLURM_NTASKS": "8"})
    distributed.check_count(1, {})
