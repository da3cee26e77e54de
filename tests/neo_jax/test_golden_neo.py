"""The model against recordings of the original NEO implementation (tests/golden/neo).

Cases are found by listing files and every size, id and theta is read from the recording's config.json, so
another set of recordings in the same format works unchanged. Tolerances are those its README suggests.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import base
from data_pipelines import schema
from neo_jax import params as params_lib
from neo_jax.convert import neo, table
from neo_jax.model.coords import rotary
from neo_jax.model.mask import dense
from neo_jax.model.transformer import Transformer
from neo_jax.objectives.ntp import cross_entropy, dense_cross_entropy
from tests import golden_files

pytestmark = pytest.mark.golden
CASES = sorted((golden_files.ROOT / "neo").glob("case*.safetensors"))


class Recording:
    """One recorded case as a batch of a single packed row."""

    def __init__(self, path):
        hf = json.loads((path.parent / "config.json").read_text())
        self.config = base.model()
        self.config.update_from_flattened_dict(neo.model_changes(hf))
        self.model = Transformer(self.config)
        self.specs = params_lib.abstract(self.model)
        self.params = table.from_hf(
            self.specs, neo.table(self.config), load_file(path.parent / "weights.safetensors")
        )
        self.case = load_file(path)
        self.ids = {"context": hf["img_context_token_id"], "start": hf["img_start_token_id"]}
        self.batch = self.make_batch()
        self.run = jax.jit(lambda params, batch: self.bound(params).hidden_states(batch))

    def make_batch(self):
        case, embed = self.case, self.config.embed
        tokens, length = case["input_ids"], len(case["input_ids"])
        is_patch = tokens == self.ids["context"]
        image_number = np.cumsum(tokens == self.ids["start"])
        bounds = case["seq_boundaries"]
        labels = np.append(case["labels"][1:], -100)
        weights = np.append(case["loss_weight"][1:], 0)
        square = embed.patch_size * embed.merge_size
        squares, places = [], []
        rows = iter(np.split(case["pixel_values"], np.cumsum(case["grid_hw"].prod(1))[:-1]))
        for height, width in case["grid_hw"]:
            p = embed.patch_size
            image = next(rows).reshape(height, width, 3, p, p).transpose(0, 3, 1, 4, 2)
            image = image.reshape(height * p, width * p, 3) * embed.pixel_std + np.asarray(embed.pixel_mean)
            image = np.rint(image * 255).astype(np.uint8)
            grid = image.shape[0] // square, image.shape[1] // square
            cut = image.reshape(grid[0], square, grid[1], square, 3).swapaxes(1, 2)
            squares.append(cut.reshape(-1, square * square * 3))
            places.append(np.indices(grid).reshape(2, -1).T)
        batch = {
            "tokens": tokens,
            "kinds": np.where(is_patch, schema.PATCH, schema.TEXT),
            "segment_ids": np.searchsorted(bounds, np.arange(length), side="right"),
            "image_ids": np.where(is_patch, image_number, 0),
            "coords": np.stack([case["t_index"], case["h_index"], case["w_index"]], -1).astype(np.float32),
            "targets": np.maximum(labels, 0),
            "loss_weights": weights.astype(np.float32),
            "patch_index": np.where(is_patch, np.cumsum(is_patch) - 1, -1),
            "patches": np.concatenate(squares),
            "patch_hw": np.concatenate(places),
        }
        cast = {np.dtype(np.int64): np.int32}
        return {k: jnp.asarray(v[None].astype(cast.get(v.dtype, v.dtype))) for k, v in batch.items()}

    def bound(self, params=None):
        return params_lib.bind(self.model, params if params is not None else self.params)


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def recording(request):
    return Recording(request.param)


def close(actual, expected, atol=1e-4):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual.reshape(expected.shape), expected, rtol=0, atol=atol)


def test_recordings_exist():
    assert CASES, "no recordings found"


def test_patch_embedding(recording):
    embed, batch, case = recording.bound().patch_embed, recording.batch, recording.case
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

    pixels = embed.pixels(batch["patches"])
    p = recording.config.embed.patch_size
    hwc = (
        case["pixel_values"].reshape(-1, 3, p, p).transpose(0, 2, 3, 1).reshape(len(case["pixel_values"]), -1)
    )
    close(by_patch(pixels, 3 * p * p), hwc, atol=1e-5)
    convolved = embed.convolve(pixels)
    rotated = embed.rotate(convolved, batch["patch_hw"])
    merged = embed.merge(rotated.reshape(*rotated.shape[:2], -1))
    close(merged, case["vision.embeds"])
    shown = np.asarray(embed(batch))[np.asarray(batch["kinds"]) == schema.PATCH]
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
    model = recording.bound()
    name = model.stacks[0]
    block = params_lib.bind(
        getattr(Transformer(recording.config), name),
        {
            path.removeprefix(name + "/"): x[0]
            for path, x in recording.params.items()
            if path.startswith(name + "/")
        },
    )
    attention, table = block.attention, rotary(block.attention.parts, batch["coords"])
    q, k, v = attention.project(block.attention_norm(model.embed(batch)), table)
    intervals = recording.model.intervals(batch)
    out = attention.attend(q, k, v, intervals, attention.scale)
    for actual, expected in [(q, "layer0.q"), (k, "layer0.k"), (v, "layer0.v"), (out, "layer0.attn_out")]:
        close(np.asarray(actual)[0].swapaxes(0, 1), case[expected])


def test_hidden_states_and_logits(recording):
    case, model = recording.case, recording.bound()
    close(model.embed(recording.batch), case["hidden_states.00_decoder_input"])
    final, after_layers = recording.run(recording.params, recording.batch)
    for index, hidden in enumerate(after_layers):
        close(hidden, case[f"hidden_states.{index + 1:02d}_after_layer_{index}"])
    close(final, case["hidden_states.final_norm"])
    close(model.logits(final), case["logits"])


@pytest.mark.parametrize("loss_fn", [cross_entropy, dense_cross_entropy])
def test_loss_and_gradients(recording, loss_fn):
    case, batch = recording.case, recording.batch

    def loss(params):
        model = recording.bound(params)
        total, ce = loss_fn(model(batch), model.head_DV(), batch["targets"], batch["loss_weights"])
        return total / batch["loss_weights"].sum(), ce

    (value, ce), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(recording.params)
    close(value, case["loss"][0], atol=1e-5)
    close(ce[0, :-1], case["per_token_ce"])
    recorded = {name.removeprefix("grad/"): x for name, x in case.items() if name.startswith("grad/")}
    ours = table.to_hf(neo.table(recording.config), gradients)
    assert recorded and set(recorded) <= set(ours)
    for name, expected in recorded.items():
        close(ours[name], expected, atol=1e-4 * np.abs(expected).max())


def test_greedy_decoding(recording):
    case = recording.case
    if "generate.prompt_ids" not in case:
        return
    model, length = recording.bound(), len(case["generate.prompt_ids"])
    steps = len(case["generate.output_ids"])
    per_token = {"patches", "patch_hw"}
    prompt = {k: v if k in per_token else v[:, :length] for k, v in recording.batch.items()}
    np.testing.assert_array_equal(prompt["tokens"][0], case["generate.prompt_ids"])
    extend = jax.jit(lambda params, *args: recording.bound(params).extend(*args))
    hidden, caches = model.prefill(prompt, cache_size=length + steps)
    logits, t = model.logits(hidden[:, -1]), prompt["coords"][0, -1, 0]
    for step in range(steps):
        close(logits, case["generate.step_logits"][step])
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        assert int(token[0]) == case["generate.output_ids"][step]
        coords = jnp.asarray([[[t + 1 + step, 0, 0]]], jnp.float32)
        slots = jnp.asarray([[length + step]], jnp.int32)
        hidden, caches = extend(recording.params, token[:, None], coords, slots, caches)
        logits = model.logits(hidden[:, -1])


def test_weights_round_trip(recording):
    folder = CASES[0].parent
    tensors = load_file(folder / "weights.safetensors")
    back = table.to_hf(neo.table(recording.config), recording.params)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
