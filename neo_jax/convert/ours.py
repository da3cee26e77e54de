"""Our checkpoints, parameter by parameter: none is ever in memory as a whole."""

import contextlib
import ctypes
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from neo_jax.checkpoint import CHUNK_BYTES, item
from neo_jax.errors import UserError


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A fresh folder beside `folder` that takes its place when the block ends without an error.

    Raises:
        UserError: `folder` is there already and not empty; nothing is ever overwritten.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={folder}: exists and is not empty; name another folder or delete it")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def return_freed_memory() -> None:
    """Has the C library (glibc) return freed memory to the system: all that is free now, large pieces always.

    By itself it keeps pieces of up to 32 MB, and what each of the threads that compress and write has freed:
    over a few parameters, on a slow disk, that is more than a parameter itself.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # other C libraries have no such settings
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
        libc.malloc_trim(0)


def save(checkpoint: pathlib.Path, params: Iterable[tuple[str, np.ndarray]], record: dict[str, Any]) -> None:
    """Writes a checkpoint folder that holds parameters and no optimizer state, one after the other.

    Args:
        params: (path, float32 values), made as they are asked for.
        record: JSON to keep with the checkpoint.
    """
    checkpoint = checkpoint.absolute()
    logging.set_verbosity(logging.FATAL)  # Orbax warns of every parameter that it is not in OCDBT
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    # OCDBT, the default, holds a parameter once more while it writes: files of their own do not.
    context.array.saving.use_ocdbt = False
    with context:
        for path, values in params:
            ocp.partial.save(checkpoint, {"params": {path: values}}, custom_metadata=record)
            del values  # before the next is made
            return_freed_memory()
        ocp.partial.finalize(checkpoint)


def loader(checkpoint: pathlib.Path) -> Callable[[str], np.ndarray]:
    """path -> parameter, as a NumPy array read from a checkpoint folder, one at a time."""
    checkpoint = checkpoint.absolute()
    name = item(checkpoint)
    metadata = ocp.checkpointables_metadata(checkpoint).metadata[name]["params"]

    def load(path: str) -> np.ndarray:
        return_freed_memory()
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        context.memory.read_concurrent_bytes = 4 * CHUNK_BYTES
        wanted = {name: {"params": {path: np.empty(metadata[path].shape, np.float32)}}}
        with context:
            return ocp.load_checkpointables(checkpoint, wanted)[name]["params"][path]

    return load
