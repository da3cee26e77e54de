"""The model against recordings of the original NEO implementation (tests/golden/neo).

Cases are found by listing files and every size, id and theta is read from the recording's config.json, so
another set of recordings in the same format works unchanged. Tolerances are those its README suggests.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import schema
from neo_jax import params as params_lib
from neo_jax.convert import table
from neo_jax.convert.neo import NEO
from neo_jax.model.coords import rotary
from neo_jax.model.mask import dense
from neo_jax.model.transformer import Transformer
from tests.neo_jax import recordings
from tests.neo_jax.recordings import Recording

pytestmark = pytest.mark.golden
CASES = recordings.cases("neo")


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def recording(request):
    return Recording(request.param)


def close(actual, expected, atol=1e-4):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual.reshape(expected.shape), expected, rtol=0, atol=atol)


def test_patch_embedding(recording):
    batch, case = recording.batch, recording.case
    m, C = recording.config.embed.merge_size, recording.config.embed.hidden_size
    grids = case["grid_hw"]

    def by_patch(x, channels):
        """[1, P, m * m, ...] in token order -> the recording's raster order of patches."""
        images = np.split(np.asarray(x)[0], np.cumsum(grids.prod(1) // m**2)[:-1])
        parts = []
        for image, (height, width) in zip(images, grids, strict=True):
            image = image.reshape(height // m, width // m, m, m, channels).swapaxes(1, 2)
            parts.append(image.reshape(-1, channels))
        return np.concatenate(parts)

    @jax.jit
    def run(params, batch):
        embed = recording.bound(params).patch_embed
        pixels = embed.pixels(batch["patches"])
        convolved = embed.convolve(pixels)
        rotated = embed.rotate(convolved, batch["patch_hw"])
        return pixels, convolved, rotated, embed.merge(rotated.reshape(*rotated.shape[:2], -1))

    pixels, convolved, rotated, merged = run(recording.params, batch)
    p = recording.config.embed.patch_size
    hwc = (
        case["pixel_values"].reshape(-1, 3, p, p).transpose(0, 2, 3, 1).reshape(len(case["pixel_values"]), -1)
    )
    close(by_patch(pixels, 3 * p * p), hwc, atol=1e-5)
    close(merged, case["vision.embeds"])
    shown = recording.outputs["patches"][batch["kinds"] == schema.PATCH]
    close(shown, case["vision.embeds"])
    if "vision.conv_gelu" in case:
        close(by_patch(convolved, C), case["vision.conv_gelu"])
        close(by_patch(rotated, C), case["vision.after_rope"])


def test_attention_mask(recording):
    batch = recording.batch
    intervals = recording.model.intervals(batch)
    mask = np.asarray(dense(intervals, batch["tokens"].shape[1]))[0]
    np.testing.assert_array_equal(mask, recording.case["attention_mask"].astype(bool))


def test_first_layer_attention(recording):
    case, batch = recording.case, recording.batch
    if "layer0.q" not in case:
        return
    name = recording.model.stacks[0]

    @jax.jit
    def run(params, batch):
        first = {p.removeprefix(name + "/"): x[0] for p, x in params.items() if p.startswith(name + "/")}
        block = params_lib.bind(getattr(Transformer(recording.config), name), first)
        attention, table = block.attention, rotary(block.attention.parts, batch["coords"])
        q, k, v = attention.project(block.attention_norm(recording.bound(params).embed(batch)), table)
        return q, k, v, attention.attend(q, k, v, recording.model.intervals(batch), attention.scale)

    names = ("layer0.q", "layer0.k", "layer0.v", "layer0.attn_out")
    for actual, expected in zip(run(recording.params, batch), names, strict=True):
        close(np.asarray(actual)[0].swapaxes(0, 1), case[expected])


def test_hidden_states_and_logits(recording):
    case, out = recording.case, recording.outputs
    embeds, *after_layers, final = out["hidden"]
    close(embeds, case["hidden_states.00_decoder_input"])
    for index, hidden in enumerate([*after_layers, out["last_layer"]]):
        close(hidden, case[f"hidden_states.{index + 1:02d}_after_layer_{index}"])
    assert sum(name.startswith("hidden_states.") for name in case) == recording.config.num_layers + 2
    close(final, case["hidden_states.final_norm"])
    close(out["logits"], case["logits"])


def test_loss_and_gradients(recording):
    case = recording.case
    recorded = {name.removeprefix("grad/"): x for name, x in case.items() if name.startswith("grad/")}
    for value, ce, gradients in recording.outputs["losses"]:
        close(value, case["loss"][0], atol=1e-5)
        close(recording.cropped(ce)[0, :-1], case["per_token_ce"])
        ours = table.to_hf(NEO.table(recording.config), gradients)
        assert recorded and set(recorded) <= set(ours)
        for name, expected in recorded.items():
            close(ours[name], expected, atol=1e-4 * np.abs(expected).max())


def test_greedy_decoding(recording):
    case = recording.case
    if "generate.prompt_ids" not in case:
        return
    length, steps = len(case["generate.prompt_ids"]), len(case["generate.output_ids"])
    per_token = [name for name in recording.batch if name not in recordings.PER_PATCH]
    prompt = recording.batch | {name: recording.batch[name][:, :length] for name in per_token}
    np.testing.assert_array_equal(prompt["tokens"][0], case["generate.prompt_ids"])

    @jax.jit
    def run(params, prompt):
        model = recording.bound(params)
        hidden, caches = model.prefill(prompt, cache_size=length + steps)

        def step(carry, slot):
            hidden, caches = carry
            logits = model.logits(hidden[:, -1])
            token = jnp.argmax(logits, -1).astype(jnp.int32)
            t = prompt["coords"][0, -1, 0] + slot - (length - 1)
            coords = jnp.stack([t, t * 0, t * 0])[None, None]
            return model.extend(token[:, None], coords, slot[None, None], caches), (token[0], logits[0])

        start = hidden[:, -1:], caches
        return jax.lax.scan(step, start, length + jnp.arange(steps, dtype=jnp.int32))[1]

    tokens, logits = run(recording.params, prompt)
    np.testing.assert_array_equal(tokens, case["generate.output_ids"])
    close(logits, case["generate.step_logits"])


def test_weights_round_trip(recording):
    recording.check_round_trip()
