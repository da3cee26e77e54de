"""Checkpoints: Orbax (v1), asynchronous and atomic.

One checkpoint holds the train state (arrays) and, as JSON, the data position and the provenance of the run.

    python -m neo_jax.checkpoint ls DIR     # names, shapes and dtypes; needs no model code
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from neo_jax.errors import UserError, main_guard


class Checkpoints:
    """The checkpoints of a workdir, newest `keep` of them. Use as a context manager: leaving waits for saves."""

    def __init__(self, folder: pathlib.Path, keep: int):
        self.folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,  # left behind by a killed run
        )
        self._pending: ocp.AsyncResponse[bool] | None = None

    @property
    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts saving and returns; the arrays are copied before this returns, so they may be donated.

        Raises the error of the previous save, if it failed: a run must not go on without checkpoints.
        """
        self.wait()
        if step not in self.steps:
            self._pending = self._checkpointer.save_checkpointables_async(
                step, {"state": state}, custom_metadata=record
            )

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises its error if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def record(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return self._checkpointer.checkpointables_metadata(step).custom_metadata

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The arrays of a checkpoint, with the shapes, dtypes and shardings of `abstract_state`.

        Raises:
            UserError: the checkpoint is damaged or does not fit, with its folder.
        """
        try:
            return self._checkpointer.load_checkpointables(step, {"state": abstract_state})["state"]
        except Exception as error:
            raise UserError(
                f"cannot restore checkpoint {self.folder / str(step)}: {error}; "
                "delete that folder to go on from the one before"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state on devices."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def list_arrays(folder: pathlib.Path) -> list[str]:
    """One line "path shape dtype" per array of a checkpoint folder."""
    if not ocp.is_orbax_checkpoint(folder.absolute()):
        raise UserError(f"{folder}: not a checkpoint; name one numbered folder inside `checkpoints/`")
    tree = ocp.checkpointables_metadata(folder.absolute()).metadata["state"]
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        lines.append(f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape} {leaf.dtype}")
    return sorted(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.checkpoint", description=__doc__)
    parser.add_argument("command", choices=["ls"])
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args(argv)
    sys.stdout.write("\n".join(list_arrays(args.folder)) + "\n")


if __name__ == "__main__":
    main_guard(main)
