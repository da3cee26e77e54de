"""The model against recordings of transformers' Fuyu (tests/golden/fuyu)."""

import numpy as np
import pytest

from data_pipelines import schema
from neo_jax import params as params_lib
from neo_jax.convert.fuyu import FUYU
from neo_jax.convert.recordings import fuyu_patches
from neo_jax.model.block import Block
from tests.neo_jax import recordings
from tests.neo_jax.recordings import Recording

pytestmark = pytest.mark.golden
CASES = recordings.cases("fuyu")


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def recording(request):
    return Recording(request.param)


def test_patch_embedding(recording):
    batch, embed = recording.batch, recording.bound().patch_embed
    pixels = np.asarray(embed.pixels(batch["patches"]))
    for row, recorded in zip(pixels, fuyu_patches(recording.case), strict=True):
        recordings.close(row[: len(recorded)], recorded, atol=2e-6)
    recording.close("out.vision_embeds", recording.outputs["patches"][batch["kinds"] == schema.PATCH])


def test_first_layer_queries_and_keys(recording):
    first = {
        path.removeprefix("layers/"): x[0]
        for path, x in recording.params.items()
        if path.startswith("layers/")
    }
    block = params_lib.bind(Block(recording.config), first)
    q, k, _ = block.attention.qkv(block.attention_norm(recording.outputs["hidden"][0]))
    recording.close("out.layer0.q_after_norm", q)
    recording.close("out.layer0.k_after_norm", k)


def test_hidden_states_and_logits(recording):
    recording.check_hidden_states_and_logits()


def test_loss_and_gradients(recording):
    recording.check_loss_and_gradients()


def test_everything_recorded_is_compared(recording):
    test_patch_embedding(recording)
    test_first_layer_queries_and_keys(recording)
    test_hidden_states_and_logits(recording)
    test_loss_and_gradients(recording)
    assert not recording.uncompared()


def test_decoding(recording):
    recording.check_decoding()


def test_weights_round_trip(recording):
    recording.check_round_trip()


def test_config_round_trip(recording):
    recording.check_config_round_trip({"|SPEAKER|": 5})


def test_older_names_are_read(recording):
    """The prefixes of the published checkpoint (specs: Fuyu 4.4) give the same tensors."""
    current = {row.name for row in FUYU.table(recording.config)}
    older = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_embed_tokens.": "vision_embed_tokens.",
    }
    for name in current:
        [prefix] = [prefix for prefix in older if name.startswith(prefix)]
        assert FUYU.canonical(older[prefix] + name.removeprefix(prefix)) == name
        assert FUYU.canonical(name) == name
