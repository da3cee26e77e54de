"""How NEO-2B and NEO-9B are split over real topologies, parameter by parameter, against files to review.

A rule that changes shows up here as a diff. To accept it: python -m tests.neo_jax.test_sharding
"""

import json

import pytest
from jax.sharding import AbstractMesh

from neo_jax import config as config_lib, hardware, mesh as mesh_lib, params as params_lib
from neo_jax.hardware import Target
from neo_jax.model.transformer import Transformer
from neo_jax.preflight import program
from tests.conftest import ROOT

FOLDER = ROOT / "tests" / "golden" / "sharding"
CASES = {  # file -> (config, slice, slices, fields)
    "neo_2b_v5e_4x4": ("neo_2b", "v5e:4x4", 1, {}),
    "neo_2b_v6e_16x16_x2": ("neo_2b", "v6e:16x16", 2, {}),
    "neo_9b_v5p_4x4x4": ("neo_9b", "v5p:4x4x4", 1, {}),
    "neo_9b_v6e_16x16_tensor4": ("neo_9b", "v6e:16x16", 1, {"mesh.tensor": "4", "mesh.fsdp": "32"}),
    "neo_9b_tpu7x_4x4x4_context2": ("neo_9b", "tpu7x:4x4x4", 1, {"mesh.context": "2", "mesh.fsdp": "64"}),
}


def described(case: str) -> dict:
    name, topology, num_slices, fields = CASES[case]
    config = config_lib.load(str(ROOT / "configs" / f"{name}.py"), list(fields.items()))
    stage = config.stages[-1]
    config = program.refit(config, stage, Target(hardware.parse(topology), num_slices))
    mesh = AbstractMesh(tuple(config.mesh[axis] for axis in mesh_lib.AXES), mesh_lib.AXES)
    specs = params_lib.abstract(Transformer(config.model))
    return {
        "mesh": {axis: config.mesh[axis] for axis in mesh_lib.AXES},
        "batch": [str(axis) for axis in mesh_lib.batch_sharding(mesh).spec],
        "batch_size": config.stage[stage].batch_size,
        "parameters": {
            path: {
                "split": [str(axis) for axis in sharding.spec],
                "shape": list(specs[path].shape),
                "on_a_device": list(sharding.shard_shape(specs[path].shape)),
            }
            for path, sharding in sorted(mesh_lib.param_shardings(mesh, specs).items())
        },
    }


@pytest.mark.parametrize("case", CASES)
def test_shardings(case):
    assert described(case) == json.loads((FOLDER / f"{case}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_no_matrix_is_whole_everywhere(case):
    """Whatever has two dimensions of model size is split over all devices but those of data and context."""
    found = described(case)
    ways = found["mesh"]["fsdp"] * found["mesh"]["tensor"]
    for path, parameter in found["parameters"].items():
        size, local = 1, 1
        for whole, part in zip(parameter["shape"], parameter["on_a_device"], strict=True):
            size, local = size * whole, local * part
        if size > 2**22 and not path.startswith("patch_embed"):
            assert size == local * ways, path


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        (FOLDER / f"{case}.json").write_text(json.dumps(described(case), indent=1) + "\n")
