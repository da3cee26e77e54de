"""Freed memory stays with a training process: the system counts the pages that it hands out."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from neo_jax import allocator

if sys.argv[1] == "kept":
    allocator.keep_freed_memory()

@jax.jit
def step(x):  # 64 MiB of temporaries: an operand of a matrix product is not fused into it
    return ((x[:, None] * x[None]) @ x).sum()

x = jnp.ones(4096)
for _ in range(20):  # on a busy machine the heap grows by a block or two more before it settles
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_steps_reuse_the_memory_that_the_first_one_freed():
    def mib_handed_out(mode: str) -> int:
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", PROGRAM, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)

    assert mib_handed_out("default") >= 5 * 64
    assert mib_handed_out("kept") < 8
