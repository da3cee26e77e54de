"""Gradients of parameters are sums over the tokens of all devices: in which dtype devices add theirs up."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from configs import base
from neo_jax import mesh as mesh_lib, params as params_lib, step as step_lib
from neo_jax.model.transformer import Transformer
from tests.neo_jax import rows
from tests.neo_jax.test_step import SOURCES


def reduced(**changes):
    """Element types that the gradients of a small NEO in bfloat16 are summed in by four chips of a v5e."""
    sizes = {"num_layers": 2, "pre_buffer": 0, "hidden_size": 256, "mlp_size": 512}
    model = Transformer(rows.tiny_model(**sizes, dtype="bfloat16", **changes))
    specs = params_lib.abstract(model)
    config = base.mesh()
    config.update(num_devices=4, fsdp=4)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = mesh_lib.make(config, topology.devices)

    def loss(params, batch):
        return step_lib.loss_sums(params_lib.bind(model, params), batch, SOURCES)["loss"]

    with jax.set_mesh(mesh):
        splits = mesh_lib.param_shardings(mesh, specs)
        params = {
            path: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=splits[path])
            for path, spec in specs.items()
        }
        rows_split = mesh_lib.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_split)
            for name, x in rows.batch(0).items()
        }
        text = jax.jit(jax.grad(loss), out_shardings=splits).lower(params, batch).compile().as_text()
    # Sums of slices in zeros are how a v5e gathers vectors.
    sums = re.findall(r"= (.*) (?:all-reduce|reduce-scatter)\((?!%dynamic-update-slice)", text)
    return [dtype for results in sums for dtype in re.findall(r"(\w+)\[", results)]


@pytest.mark.parametrize("mlp", ["shared", "topk"])
def test_devices_add_gradients_up_in_float32(mlp, tpu_compiler):
    summed = reduced(**{"route.mlp": mlp})
    assert len(summed) > 10
    assert set(summed) == {"f32"}
    layers = 6 + 3  # q, k, v, q_hw, k_hw, o, gate, up, down
    assert reduced(**{"route.mlp": mlp, "reduce_dtype": "bfloat16"}).count("bf16") == layers
