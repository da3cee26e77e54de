"""Where compiled programs are kept for the next start of a run."""

import os
import subprocess
import sys

import pytest

CODE = """
import pathlib, sys
import jax
from neo_jax import xla_options

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
xla_options.keep_programs(pathlib.Path(sys.argv[1]), sys.argv[2])
jax.jit(lambda x: x + 1)(1.0)
"""


@pytest.mark.parametrize(
    ("platform", "named", "where"), [("tpu", "", "run"), ("tpu", "users", "users"), ("cpu", "", "")]
)
def test_programs_are_kept_in_one_folder(tmp_path, platform, named, where):
    """JAX itself is asked, on a CPU that says it is something else."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    if named:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / named)
    command = [sys.executable, "-c", CODE, tmp_path / "run", platform]
    subprocess.run(command, env=environment, check=True)
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == ([where] if where else [])
