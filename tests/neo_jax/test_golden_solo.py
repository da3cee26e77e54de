"""The model against recordings of the original SOLO implementation (tests/golden/solo)."""

import numpy as np
import pytest

from data_pipelines import schema
from neo_jax.convert.recordings import rows_to_squares
from neo_jax.model.mask import dense
from tests.neo_jax import recordings
from tests.neo_jax.recordings import Recording

pytestmark = pytest.mark.golden
CASES = recordings.cases("solo")


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def recording(request):
    return Recording(request.param)


def test_patch_embedding(recording):
    case, batch, embed = recording.case, recording.batch, recording.bound().patch_embed
    pixels = np.asarray(embed.pixels(batch["patches"]))[batch["patches"].any(-1)]
    side, order = recording.config.embed.patch_size, "C,H,W"
    assert recording.recorded["image_norm"]["patch_flatten_order"] == order
    recordings.close(pixels, rows_to_squares(case["in.vision_patches"], side, order), atol=2e-6)
    recording.close("out.vision_embeds", recording.outputs["patches"][batch["kinds"] == schema.PATCH])


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
