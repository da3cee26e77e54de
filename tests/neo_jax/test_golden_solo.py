"""The model against recordings of the original SOLO implementation (tests/golden/solo)."""

import json

import numpy as np
import pytest

from data_pipelines import schema
from neo_jax.convert.solo import SOLO
from neo_jax.model.mask import dense
from tests.neo_jax import recordings
from tests.neo_jax.recordings import Recording

pytestmark = pytest.mark.golden
CASES = recordings.cases("solo")


def load(path):
    hf = json.loads((path.parent / "config.json").read_text())
    # The recorded config's window is wider than any row; the case that shows one was run with another.
    window = {"sliding_window": hf["sliding_window_for_eager_case"]} if "sliding_window" in path.stem else {}
    norm = {f"embed.pixel_{part}": tuple(hf["image_norm"][part]) for part in ("mean", "std")}
    recording = Recording(path, SOLO, hf["config"], **window, **norm)
    case, embed, ids = recording.case, recording.config.embed, hf["special_token_ids"]
    tokens, index = case["in.input_ids"], case["in.vision_patch_indices"]
    is_patch = index >= 0
    np.testing.assert_array_equal(is_patch, tokens == ids["vpatch"])
    kinds = np.full(tokens.shape, schema.TEXT)
    kinds[is_patch], kinds[tokens == ids["vrow_sep"]] = schema.PATCH, schema.SEPARATOR
    squares = recordings.rows_to_squares(
        case["in.vision_patches"], embed.patch_size, hf["image_norm"]["patch_flatten_order"]
    )
    squares = recordings.uint8_pixels(squares, embed.pixel_mean, embed.pixel_std)
    squares = squares.reshape(len(squares), -1)
    positions, segment_ids = case.get("in.position_ids"), case["in.attention_mask"]
    if positions is not None:  # packed documents: positions restart at each
        segment_ids = np.cumsum(positions == 0, axis=1)
    recording.batch = recordings.token_table(
        tokens,
        kinds,
        [squares[row[row >= 0]] for row in index],
        case["in.labels"],
        segment_ids=segment_ids,
        positions=positions,
    )
    return recording


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def recording(request):
    return load(request.param)


def test_patch_embedding(recording):
    case, batch, embed = recording.case, recording.batch, recording.bound().patch_embed
    shown = np.asarray(batch["kinds"]) == schema.PATCH
    pixels = np.asarray(embed.pixels(batch["patches"]))[np.asarray(batch["patches"]).any(-1)]
    side, order = recording.config.embed.patch_size, "C,H,W"
    recorded = recordings.rows_to_squares(case["in.vision_patches"], side, order)
    recordings.close(pixels, recorded, atol=2e-6)
    recording.close("out.vision_embeds", np.asarray(embed(batch))[shown])


def test_attention_mask(recording):
    """One document in a row is causal; packed ones have the recorded block mask."""
    case, batch = recording.case, recording.batch
    length = batch["tokens"].shape[1]
    mask = np.asarray(dense(recording.model.intervals(batch), length))
    i, j = np.indices((length, length))
    expected = (j <= i) & (j >= i - recording.config.sliding_window)
    recorded = case["in.attention_mask"]
    visible = recorded[:, 0] > 0 if recorded.ndim == 4 else recorded[:, None] > 0
    real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_array_equal(mask[real], np.broadcast_to(expected & visible, mask.shape)[real])


def test_hidden_states_and_logits(recording):
    recording.check_hidden_states_and_logits()


def test_loss_and_gradients(recording):
    recording.check_loss_and_gradients()


def test_everything_recorded_is_compared(recording):
    test_patch_embedding(recording)
    test_hidden_states_and_logits(recording)
    test_loss_and_gradients(recording)
    assert not recording.uncompared()


def test_decoding(recording):
    recording.check_decoding()


def test_weights_round_trip(recording):
    recording.check_round_trip()


def test_config_round_trip(recording):
    recording.check_config_round_trip({"<vpatch>": 5, "<vrow_sep>": 6})
