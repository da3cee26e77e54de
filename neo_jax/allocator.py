"""Host memory of training on CPUs: what a step frees stays with the process for the next one.

XLA allocates a step's temporaries as one block, larger than the state, and frees it when the step is done. By
default glibc then returns it to the system, which hands out every page again, zeroed, at first touch: a sixth
of a step on an idle machine, and half on one that shares its memory. And a step that is dispatched before the
last one's thread has freed its block takes a second block, at a place that was never touched.
"""

import ctypes
import glob

import jax

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def keep_freed_memory() -> None:
    """Call it before JAX starts its devices. Does nothing where these are accelerators, or without glibc.

    Which they will be must be known before XLA's threads exist, hence the look at device files:
    a thread keeps the heap that it first allocates from, and only the main one can hold large blocks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    on_cpu = jax.config.jax_platforms == "cpu" or not any(map(glob.glob, _ACCELERATORS))
    if mallopt is None or not on_cpu:
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    # Steps run in the thread that calls them, which returns when their block is free.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
