"""The model against recordings of transformers' Fuyu (tests/golden/fuyu)."""

import json

import numpy as np
import pytest

from data_pipelines import schema
from neo_jax import params as params_lib
from neo_jax.convert.fuyu import FUYU
from neo_jax.model.block import Block
from tests.neo_jax import recordings
from tests.neo_jax.recordings import Recording

pytestmark = pytest.mark.golden
CASES = recordings.cases("fuyu")


def recorded_patches(case):
    """Normalised patches of each row of the batch, [p, 3 * side^2]: one tensor, or one per sample."""
    if "in.image_patches" in case:
        return list(case["in.image_patches"])
    names = sorted((name for name in case if name.startswith("in.image_patches.")), key=lambda n: int(n[17:]))
    return [case[name][0] for name in names]


def load(path):
    hf = json.loads((path.parent / "config.json").read_text())
    recording = Recording(path, FUYU, hf["config"])
    case, embed = recording.case, recording.config.embed
    tokens = case["in.input_ids"]
    kinds = np.full(tokens.shape, schema.TEXT)
    kinds[tokens == hf["image_token_id"]] = schema.PATCH
    kinds[tokens == hf["image_newline_id"]] = schema.SEPARATOR
    squares = [
        recordings.uint8_pixels(
            recordings.rows_to_squares(rows, embed.patch_size, "H,W,C"), embed.pixel_mean, embed.pixel_std
        )
        for rows in recorded_patches(case)
    ]
    recording.batch = recordings.token_table(
        tokens,
        kinds,
        [x.reshape(len(x), -1) for x in squares],
        case["in.labels"],
        segment_ids=case["in.attention_mask"],
    )
    return recording


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def recording(request):
    return load(request.param)


def test_patch_embedding(recording):
    batch, embed = recording.batch, recording.bound().patch_embed
    pixels = np.asarray(embed.pixels(batch["patches"]))
    for row, recorded in zip(pixels, recorded_patches(recording.case), strict=True):
        recordings.close(row[: len(recorded)], recorded, atol=2e-6)
    shown = np.asarray(batch["kinds"]) == schema.PATCH
    recording.close("out.vision_embeds", np.asarray(embed(batch))[shown])


def test_first_layer_queries_and_keys(recording):
    first = {
        path.removeprefix("layers/"): x[0]
        for path, x in recording.params.items()
        if path.startswith("layers/")
    }
    block = params_lib.bind(Block(recording.config), first)
    q, k, _ = block.attention.qkv(block.attention_norm(recording.outputs["embeds"]))
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
