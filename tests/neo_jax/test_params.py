"""The abstract tree: counts against NEO's published sizes, initial values, selection."""

import jax
import numpy as np
import pytest

from configs import base
from neo_jax import params as params_lib
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from tests.neo_jax import rows


def neo_2b():
    c = base.model()
    c.vocab_size, c.hidden_size, c.mlp_size = 151936, 2048, 6144
    c.num_layers, c.pre_buffer, c.num_heads, c.num_kv_heads, c.head_dim = 40, 12, 16, 8, 128
    c.embed.hidden_size = 1024
    return c


def test_counts_of_neo_2b():
    """specs/neo.md section 1: 56,627,712 per layer, 2.897 B untied, 2.585 B tied. No array is made."""
    specs = params_lib.abstract(Transformer(neo_2b()))
    layers = {path: spec for path, spec in specs.items() if path.startswith("layers/")}
    assert params_lib.count(layers) == 28 * 56_627_712
    assert round(params_lib.count(specs) / 1e9, 3) == 2.897
    tied = neo_2b()
    tied.tie_embeddings = True
    assert round(params_lib.count(params_lib.abstract(Transformer(tied))) / 1e9, 3) == 2.585


def test_initial_values_depend_on_seed_and_path_only():
    specs = params_lib.abstract(Transformer(rows.tiny_model()))
    deeper = params_lib.abstract(Transformer(rows.tiny_model(pre_buffer=0)))
    draw = jax.jit(lambda key: params_lib.init(specs, key))
    values, again, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
    without_pre_buffer = jax.jit(lambda key: params_lib.init(deeper, key))(jax.random.key(0))
    for path, spec in specs.items():
        np.testing.assert_array_equal(values[path], again[path])
        assert values[path].shape == spec.shape
        if "norm" in path:
            assert (values[path] == 1).all()
        else:
            assert not np.array_equal(values[path], other[path])
    np.testing.assert_array_equal(values["head"], without_pre_buffer["head"])
    layers = values["layers/mlp/gate/weight"]
    assert not np.array_equal(layers[0], layers[1])
    assert 0.08 < float(layers.std()) < 0.12  # normal with init_std 0.1


def test_patch_embedding_starts_as_pytorch_convolutions_do():
    c = rows.tiny_model(**{"embed.hidden_size": 64})
    specs = params_lib.abstract(Transformer(c))
    values = jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(0))
    bound = (3 * c.embed.patch_size**2) ** -0.5
    kernel = values["patch_embed/patch/weight"]
    assert float(abs(kernel).max()) <= bound and float(kernel.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_select_and_decay():
    specs = params_lib.abstract(Transformer(rows.tiny_model()))
    chosen = params_lib.select(specs, [r".*/q_norm_[hw]/weight", "head"])
    assert chosen == {
        "head",
        *(
            f"{stack}/attention/qkv/q_norm_{axis}/weight"
            for stack in ("pre_buffer", "layers")
            for axis in "hw"
        ),
    }
    with pytest.raises(UserError, match=r"'layer/.\*' matches no parameter of .*layers/attention/qkv/k"):
        params_lib.select(specs, ["head", "layer/.*"])
    assert {path for path, spec in specs.items() if not spec.decays} == {
        path for path in specs if "norm" in path or path.endswith("bias")
    }
