"""What the options make of a program, and where programs are kept for the next start of a run."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from neo_jax import xla_options
from neo_jax.preflight import hlo, program

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


def test_v5p_gathers_while_it_multiplies(tpu_compiler):
    """Layers of two products, weights split over a torus: the second's are gathered beside the first."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5:4x4x4").devices
    mesh = jax.make_mesh((64,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)

    def array(shape, *split):
        sharding = NamedSharding(mesh, PartitionSpec(*split))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def forward(weights, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x, weights)[0]

    weights = array((4, 1024, 2048), None, "fsdp"), array((4, 2048, 1024), None, None, "fsdp")
    with jax.set_mesh(mesh):
        lowered = jax.jit(forward).lower(weights, array((64, 8192, 1024), "fsdp"))
        _, text = program.schedule(lowered, xla_options.of(mesh))
    found = [(c.opcode, c.times, c.overlapped) for c in hlo.Module(text).collectives()]
    assert found == [("all-gather", 4, False), ("all-gather", 4, True)]
