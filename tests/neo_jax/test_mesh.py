"""The rules table: which parameter is split how, and what cannot be split."""

import jax
import pytest
from jax.sharding import PartitionSpec

from configs import base
from neo_jax import mesh as mesh_lib, params as params_lib
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from tests.neo_jax import rows


def make(**axes):
    config = base.mesh()
    config.update(num_devices=4, **axes)
    return mesh_lib.make(config)


def test_every_parameter_has_a_rule():
    specs = params_lib.abstract(Transformer(rows.tiny_model()))
    partitions = {path: mesh_lib.partition(spec.axes) for path, spec in specs.items()}
    assert partitions["layers/attention/qkv/q/weight"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert partitions["layers/mlp/down/weight"] == PartitionSpec(None, "tensor", "fsdp")
    assert partitions["token_embed"] == PartitionSpec("tensor", "fsdp")
    assert partitions["norm/weight"] == PartitionSpec("fsdp")


def test_two_axes_on_one_mesh_axis_collide():
    spec = params_lib.ParamSpec((8, 8), ("heads", "mlp"), params_lib.ones, decays=True)
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\) collide"):
        mesh_lib.partition(spec.axes)


def test_indivisible_dimension_is_named():
    specs = params_lib.abstract(Transformer(rows.tiny_model(num_kv_heads=2)))
    with pytest.raises(UserError, match=r"mesh.tensor=4 does not divide .*'kv_heads' of size 2"):
        mesh_lib.param_shardings(make(tensor=4), specs)


def test_wrong_device_count_is_named():
    config = base.mesh()
    config.num_devices = 3
    with pytest.raises(UserError, match=f"mesh.num_devices is 3, but this run has {jax.device_count()} cpu"):
        mesh_lib.make(config)
