"""Every experiment in configs/: published parameter counts, what each stage trains, one step of each."""

import re
from pathlib import Path

import pytest

from configs import backbones, base
from neo_jax import config as config_lib, params as params_lib
from neo_jax.model.transformer import Transformer

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name):
    """The resolved config of "neo_2b" or "neo_2b:smoke"."""
    file, colon, arg = name.partition(":")
    return config_lib.load(str(CONFIGS / f"{file}.py") + colon + arg)


def specs_of(config):
    return params_lib.abstract(Transformer(config.model))


def count(specs, pattern=".*"):
    return params_lib.count({path: spec for path, spec in specs.items() if re.fullmatch(pattern, path)})


# Parameters without the patch embedding, from the models' own cards; where the exact number is public, exact.
BACKBONES = {
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "qwen2p5_7b": 7_615_616_512,
    "mistral_7b": 7_241_732_096,
    "llama2_7b": 6_738_415_616,
    "internlm2_1p8b": 1_889_110_016,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_have_the_published_sizes(name):
    model = base.model()
    getattr(backbones, name)(model)
    assert count(params_lib.abstract(Transformer(model)), "(?!patch_embed/).*") == BACKBONES[name]


def test_neo_has_the_published_sizes():
    """specs/neo.md section 1: parameters of a layer, and of the whole model, untied and tied."""
    for name, layers, per_layer, untied, tied in (
        ("neo_2b", 40, 56_627_712, 2.897, 2.585),
        ("neo_9b", 42, 213_918_208, 10.25, 9.62),
    ):
        specs = specs_of(load(name))
        assert count(specs, "(layers|pre_buffer)/.*") == layers * per_layer
        digits = len(str(untied).partition(".")[2])
        assert round(count(specs) / 1e9, digits) == untied
        assert round((count(specs) - count(specs, "head")) / 1e9, digits) == tied
