"""Checkpoints in two tiers, for several slices: often into memory, rarely into the workdir.

Orbax's emergency manager, which it calls experimental. A slice is here one copy of the weights, an index of
the mesh's `data` axis. Every slice but the first saves each checkpoint into a folder of its hosts, such as a
ramdisk; the first saves those that are to last into the workdir. After a restart, the newest checkpoint that
one slice has as a whole is sent to all others: as a sum with zeros, so that only the sign of a zero is lost.
"""

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint._src.multihost import multihost  # the manager must be told the devices; no public way
from orbax.checkpoint.experimental.emergency import checkpoint_manager as orbax_emergency
from orbax.checkpoint.experimental.emergency.path import get_per_replica_local_steps

from neo_jax import mesh as mesh_lib, workdir as workdir_lib
from neo_jax.checkpoint import CHUNK_BYTES, Checkpoints, first_line, steps_in
from neo_jax.errors import UserError

_AXIS = mesh_lib.AXES.index("data")


def open_checkpoints(train: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> Checkpoints:
    """Those of a run, as config.train says. All processes must call this."""
    folder, keep = workdir / "checkpoints", (train.keep_checkpoints, train.keep_steps)
    if not train.local_folder:
        return Checkpoints(folder, *keep)
    local_folder = pathlib.Path(train.local_folder) / workdir_lib.run_id(workdir)
    return EmergencyCheckpoints(folder, *keep, local_folder, mesh)


class EmergencyCheckpoints(Checkpoints):
    """As Checkpoints, with newer ones in a folder of every host besides. `mesh` has several slices.

    Args:
        local_folder: the same path on all hosts, which outlives the processes, but not the machine.

    Raises:
        UserError: a process belongs to several slices, or the folder cannot be made.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep: int,
        keep_steps: Sequence[int],
        local_folder: pathlib.Path,
        mesh: Mesh,
    ):
        logging.set_verbosity(logging.FATAL)  # as in Checkpoints
        self.folder, self._mesh, self._keep, self._keep_steps = folder, mesh, keep, keep_steps
        self._slice = _slice_of_this_process(mesh)
        layout = "x".join(map(str, mesh.devices.shape)) + f"-of-{jax.process_count()}"
        self._local = local_folder.absolute() / layout / f"process-{jax.process_index()}"
        try:
            self._local.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"train.local_folder: {self._local} cannot be made: {error.strerror}") from error
        for other in local_folder.iterdir():  # left by another mesh, it is not to be read by this one
            if other.name != layout:
                shutil.rmtree(other, ignore_errors=True)
        if not flags.FLAGS.is_parsed():  # the manager reads some
            flags.FLAGS.mark_as_parsed()
        multihost.initialize_distributed_to_device_ids()
        self._lasting = set(steps_in(folder))
        whole = get_per_replica_local_steps(
            epath.Path(self._local),
            step_name_format=ocp.path.step.standard_name_format(),
            global_mesh=mesh,
            replica_axis_index=_AXIS,
        )
        self._slices_with = {
            step: sorted(index for index, steps in whole.items() if step in steps)
            for step in set().union(*whole.values())
        }
        self._local_steps = set(whole.get(self._slice, ()))
        for path in self._local.iterdir():  # the slice has them in part: other hosts lack their files
            if path.name.isdigit() and int(path.name) not in self._local_steps:
                shutil.rmtree(path)
        self._manager: orbax_emergency.CheckpointManager | None = None  # made once the shapes are known
        self._saving, self._saving_lasting = 0, False
        self._newest = max(self._lasting | self._slices_with.keys(), default=0)

    @property
    def latest(self) -> int:
        return self._newest

    @property
    def _writes_to(self) -> pathlib.Path:
        return self._local if self._slice else self.folder

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        slices = self._slices_with.get(step)
        if jax.process_index() == 0:
            where = f"memory of slice {slices[0]}" if slices else f"{self.folder}: no slice has a newer one"
            print(f"restores step {step} from {where}", flush=True)
        if not slices:
            return super().restore(step, like)
        try:
            with jax.set_mesh(None):  # the manager makes small arrays that are not meant for the mesh in use
                state = self._open(like).restore(step).state
            record = _record(self._local / str(step)) if step in self._local_steps else None
        except Exception as error:
            raise UserError(
                f"cannot restore checkpoint {self._local / str(step)}: {first_line(error)}; delete that "
                "folder to go on from the one before"
            ) from error
        return state, next(found for found in mesh_lib.gather(record) if found is not None)

    def _make_way(self, lasting: bool) -> None:
        if lasting or self._manager is None:
            self.wait()
        else:
            self.poll()  # the first slice may still write into the workdir: the next that is to last waits

    def _look(self) -> None:
        if self._manager is not None:
            self._manager.check_for_errors()

    def _start(self, step: int, state: Any, record: dict[str, Any], lasting: bool) -> None:
        self._saving_lasting = lasting
        arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
        with jax.set_mesh(None):
            self._open(state).save(
                step,
                ocp.args.Composite(state=ocp.args.PyTreeSave(state, save_args=arguments)),
                custom_metadata=record,
            )
        self._newest = step
        self._local_steps.add(step)
        if lasting:
            self._lasting.add(step)

    def _finish(self) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def _close(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def _open(self, like: Any) -> orbax_emergency.CheckpointManager:
        if self._manager is None:
            keep = policies.AnyPreservationPolicy(
                [policies.LatestN(self._keep), policies.CustomSteps(self._keep_steps)]
            )
            self._manager = orbax_emergency.CheckpointManager(
                self._local,
                self.folder.absolute(),
                self._mesh,
                jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like),
                options=orbax_emergency.CheckpointManagerOptions(
                    # One is whole while the next is written.
                    local=orbax_emergency.LocalCheckpointOptions(
                        should_save_fn=lambda step, _: step not in self._local_steps, max_to_keep=1
                    ),
                    persistent=orbax_emergency.PersistentCheckpointOptions(
                        should_save_fn=lambda step, _: self._saving_lasting and step not in self._lasting,
                        preservation_policy=keep,
                    ),
                    replica_axis_index=_AXIS,
                    cleanup_tmp_directories=True,
                ),
            )
        return self._manager


def _record(folder: pathlib.Path) -> dict[str, Any]:
    """The JSON record of a local checkpoint."""
    return json.loads((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


def _slice_of_this_process(mesh: Mesh) -> int:
    held: dict[int, set[int]] = {}
    for index, device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(index[_AXIS])
    if any(len(indices) > 1 for indices in held.values()):
        raise UserError(
            f"train.local_folder: a process holds several of the mesh.data={mesh.shape['data']} copies of "
            "the weights; make mesh.fsdp * mesh.tensor * mesh.context a multiple of the devices of a process"
        )
    return held[jax.process_index()].pop()
