"""Checkpoints in memory: restored after a kill; where they are gone, the workdir's is taken."""

import signal

import jax
import numpy as np
import pytest

from neo_jax import config as config_lib, mesh as mesh_lib, restore, workdir
from neo_jax.checkpoint import Checkpoints, list_arrays, steps_in
from neo_jax.emergency import EmergencyCheckpoints
from neo_jax.errors import UserError
from tests.neo_jax import member
from tests.neo_jax.groups import ROOT, losses, member_command, read_rows, run, start, train, wait_until


def test_the_newest_checkpoint_is_recalled_to_the_bit(tmp_path):
    """2 slices of one process and 2 devices: one has step 3 after a kill, none once its files are gone."""
    log, mesh = tmp_path / "log", "data=2,fsdp=2"
    with start(member_command("remember", tmp_path, mesh), 2, log) as group:
        wait_until(lambda: log.read_text().count("remembered") == 2, group, log)
        group.send(signal.SIGKILL)
    (tmp_path / "memory" / "4x1x1x1-of-4" / "process-1" / "9").mkdir(parents=True)
    output = run(member_command("recall", tmp_path, mesh), 2, tmp_path / "again")
    assert "restores step 3 from memory of slice 1" in output
    assert [path.name for path in (tmp_path / "memory").iterdir()] == ["2x2x1x1-of-2"]
    assert f"restores step 1 from {tmp_path / 'steps'}: no slice has a newer one" in output

    alone = jax.make_mesh((1, 1, 1, 1), mesh_lib.AXES, devices=jax.devices()[:1])
    blank = {name: np.zeros(member.SHAPES[name], np.float32) for name in ("a/weight", "c")}
    with Checkpoints(tmp_path / "steps", keep=10) as saved:
        assert saved.latest == 1
        restored, record = saved.restore(1, member.state(alone, blank))
        assert record["step"] == 1
        member.assert_holds(restored, {name: member.values()[name] for name in blank})
        saved.save(2, restored, record)
    assert steps_in(tmp_path / "steps") == [1, 2]
    assert "a/weight (8, 12) float32" in list_arrays(tmp_path / "steps" / "1")


@pytest.mark.slow
def test_a_killed_run_goes_on_from_memory_bit_for_bit(quickstart_data, tmp_path):
    def argv(name):
        fields = {"mesh.data": 2, "train.save_every": 4, "train.local_folder": tmp_path / "memory"}
        fields |= {"train.local_every": 1}
        flags = [f"--config.{field}={value}" for field, value in fields.items()]
        return train(tmp_path / name, quickstart_data, 2, 6, *flags)

    run(argv("straight"), 2, tmp_path / "straight.log")
    log = tmp_path / "log"
    with start(argv("killed"), 2, log) as group:
        wait_until(lambda: list((tmp_path / "memory").glob("*/*/*/3")), group, log)
        group.send(signal.SIGKILL)
    output = run(argv("killed"), 2, tmp_path / "again.log")
    assert "from memory of slice 1" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "straight")
    killed, straight = (
        restore.load(tmp_path / name, workdir.load_config(tmp_path / name), 6).params
        for name in ("killed", "straight")
    )
    jax.tree.map(np.testing.assert_array_equal, killed, straight)


def test_a_run_may_begin_and_end_to_use_memory(tmp_path):
    changes = [[], [("train.local_folder", "/ramdisk"), ("mesh.data", "2"), ("mesh.num_devices", "2")], []]
    for overrides in changes:
        workdir.claim(tmp_path, config_lib.load(f"{ROOT}/configs/quickstart.py:smoke", overrides))


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train.local_folder: needs mesh.data of at least 2"):
        config_lib.load(f"{ROOT}/configs/quickstart.py:smoke", [("train.local_folder", "/ramdisk")])
    mesh = jax.make_mesh((2, 1, 1, 1), mesh_lib.AXES, devices=jax.devices()[:2])
    with pytest.raises(UserError, match=r"a process holds several of the mesh.data=2 copies"):
        EmergencyCheckpoints(tmp_path, 1, (), tmp_path / "memory", mesh)
