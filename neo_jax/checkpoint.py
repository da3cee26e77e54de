"""Checkpoints: Orbax (v1), asynchronous and atomic.

One checkpoint holds the train state (arrays) and, as JSON, the data position and the provenance of the run.

    python -m neo_jax.checkpoint ls DIR     # names, shapes and dtypes; needs no model code
"""

import argparse
import contextlib
import pathlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from neo_jax.errors import SaveFailed, SaveFault, UserError, main_guard, may_pass

CHUNK_BYTES = 16_000_000  # an array is compressed, written and read in pieces of this size


class Checkpoints:
    """The newest `keep` checkpoints of a run and those of `keep_steps`.

    Use as a context manager: leaving waits for the last save.
    """

    def __init__(self, folder: pathlib.Path, keep: int, keep_steps: Sequence[int] = ()):
        self.folder = folder
        # Orbax logs a failed save once per thread, with tracebacks; it also raises it, and that is told once.
        logging.set_verbosity(logging.FATAL)
        context = ocp.Context()
        # Else an array, or a device's part of it, is one piece: whoever reads it holds it twice.
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.CustomSteps(keep_steps)]
            ),
            cleanup_tmp_directories=True,  # left behind by a killed run
            context=context,
        )
        self._pending: ocp.AsyncResponse[bool] | None = None
        self._saving = 0

    @property
    def latest(self) -> int:
        """Steps taken at the newest checkpoint; 0 if there is none."""
        latest = self._checkpointer.latest
        return latest.step if latest is not None else 0

    def save(self, step: int, state: Any, record: dict[str, Any], lasting: bool = True) -> None:
        """Starts saving and returns; the arrays are copied before this returns, so they may be donated.

        Args:
            lasting: False for a checkpoint between two that were asked for, to lose less after a failure
                (emergency.py).

        Raises:
            UserError: the previous save failed. A run must not go on without checkpoints.
        """
        self._make_way(lasting)
        try:
            self._start(step, state, record, lasting)
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step

    def _make_way(self, lasting: bool) -> None:
        self.wait()

    def _start(self, step: int, state: Any, record: dict[str, Any], lasting: bool) -> None:
        if step != self.latest:  # else just restored
            self._pending = self._checkpointer.save_checkpointables_async(
                step, {"state": state}, custom_metadata=record
            )

    def poll(self) -> None:
        """Waits for nothing.

        Raises:
            UserError: the last save has failed by now; the checkpoints before it are whole.
        """
        try:
            self._look()
        except Exception as error:
            raise self._failed(self._saving, error) from error

    def _look(self) -> None:
        if self._pending is not None:
            with contextlib.suppress(TimeoutError):  # still being written
                self._pending.result(timeout=0)

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
            UserError: it failed; the checkpoints before it are whole.
        """
        try:
            self._finish()
        except Exception as error:
            raise self._failed(self._saving, error) from error

    def _finish(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _close(self) -> None:
        self._checkpointer.close()

    @property
    def _writes_to(self) -> pathlib.Path:
        return self.folder

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        """Whatever the storage raised, told with its folder."""
        kind = SaveFault if may_pass(error) else SaveFailed
        return kind(f"saving checkpoint {self._writes_to / str(step)} failed: {first_line(error)}")

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """A checkpoint's arrays, with the shapes, dtypes and shardings of `like`, and its JSON record.

        Raises:
            UserError: the checkpoint is damaged or does not fit.
        """
        try:
            return load(self.folder / str(step), like)
        except UserError as error:
            raise UserError(f"{error}; delete that folder to go on from the one before") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure: UserError | None = None
        try:
            self.wait()
        except UserError as failed:
            failure = failed
        try:
            self._close()
        except Exception as failed:  # Orbax raises a failed save, told already, once more here
            if failure is None and not isinstance(error, UserError):
                failure = self._failed(self._saving, failed)
        if failure is not None:
            raise failure


def load(folder: pathlib.Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The arrays of a checkpoint folder, with the shapes, dtypes and shardings of `like`, and its JSON
    record.

    Raises:
        UserError: it is no checkpoint, damaged, or does not fit.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    try:
        name = item(folder)
        state = ocp.load_checkpointables(folder.absolute(), {name: abstract})[name]
        record = ocp.checkpointables_metadata(folder.absolute()).custom_metadata
    except Exception as error:  # Orbax raises many kinds for damaged files
        raise UserError(f"cannot restore checkpoint {folder}: {first_line(error)}") from error
    return state, record


def item(folder: pathlib.Path) -> str:
    """The name of the train state in a checkpoint folder; those that emergency.py saves have Orbax's own."""
    return "default" if (folder / "default").is_dir() else "state"


def steps_in(folder: pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints in a folder."""
    names = [path.name for path in folder.absolute().iterdir()] if folder.is_dir() else []
    return sorted(
        int(name) for name in names if name.isdigit() and ocp.is_orbax_checkpoint(folder.absolute() / name)
    )


def list_arrays(folder: pathlib.Path) -> list[str]:
    """One line "path shape dtype" per array of a checkpoint folder.

    Raises:
        UserError: the folder is not a checkpoint.
    """
    if not ocp.is_orbax_checkpoint(folder.absolute()):
        raise UserError(f"{folder}: not a checkpoint; name one numbered folder inside `checkpoints/`")
    tree = ocp.checkpointables_metadata(folder.absolute()).metadata[item(folder)]
    return sorted(
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape} {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    )


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.checkpoint", description="Lists a checkpoint's arrays."
    )
    parser.add_argument("command", choices=["ls"])
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args(argv)
    print("\n".join(list_arrays(args.folder)))


if __name__ == "__main__":
    main_guard(main)
