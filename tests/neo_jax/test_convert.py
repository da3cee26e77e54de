"""The NEO table: refusals, and an exported folder that reads back."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from safetensors.numpy import load_file

from data_pipelines.text import Tokenizer
from neo_jax import params as params_lib
from neo_jax.convert import neo, table
from neo_jax.convert.export import export
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from tests.neo_jax import rows


@pytest.fixture
def tiny():
    config = rows.tiny_model()
    specs = params_lib.abstract(Transformer(config))
    return config, specs, jax.device_get(jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(0)))


def test_round_trip_is_identity(tiny):
    config, specs, params = tiny
    back = table.from_hf(specs, neo.table(config), table.to_hf(neo.table(config), params))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_bad_checkpoints_are_named(tiny):
    config, specs, params = tiny
    tensors = table.to_hf(neo.table(config), params)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserError, match=f"lacks 1 tensors, first {name}"):
        table.from_hf(specs, neo.table(config), {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UserError, match="does not know, first surprise"):
        table.from_hf(specs, neo.table(config), tensors | {"surprise": np.zeros(1)})
    with pytest.raises(UserError, match=rf"{name} has shape \(3, 32\), the config needs \(48, 32\)"):
        table.from_hf(specs, neo.table(config), tensors | {name: tensors[name][:3]})


def test_export_reads_back(tiny, tmp_path, quickstart_data):
    config, specs, params = tiny
    run = ConfigDict(quickstart_data)
    run.model = config
    stage = run.stage.full
    stage.min_pixels, stage.max_pixels = 1024, 4096
    tokenizer = Tokenizer(Path(run.data.path) / "tokenizer.json")
    export(tmp_path / "hf", FrozenConfigDict(run), stage, params.get, tokenizer)
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert hf["model_type"] == "neo_chat" and hf["vision_config"]["max_pixels"] == 4096
    tokenizer = Tokenizer(tmp_path / "hf" / "tokenizer.json")
    assert hf["img_context_token_id"] == tokenizer.image_context
    changes = neo.model_changes(hf)
    assert changes == {name: rows_get(config, name) for name in changes}
    back = table.from_hf(specs, neo.table(config), load_file(tmp_path / "hf" / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def rows_get(config, dotted):
    for name in dotted.split("."):
        config = config[name]
    return config


def test_config_shape_is_the_recorded_one(tiny, golden_dir):
    """Every field that NEO's own save writes and that describes the model is there, in the same place."""
    recorded = json.loads((golden_dir("neo") / "config.json").read_text())
    ours = neo.hf_config(tiny[0], {"<IMG_CONTEXT>": 3, "<img>": 4}, 1024, 4096)
    housekeeping = {
        "output_attentions",
        "transformers_version",
        "attention_dropout",
        "layer_types",
        "rope_scaling",
    }
    housekeeping |= {"max_window_layers", "sliding_window", "use_cache", "use_sliding_window"}
    for section in (None, "llm_config", "vision_config"):
        expected = set(recorded[section] if section else recorded) - housekeeping
        assert expected <= set(ours[section] if section else ours)
