"""EVEv2 against recordings of the original (tests/golden/evev2): routed both ways, shared norms, dense.

Every routed case is run in two forms. As "blend" both branches see all tokens, which is what the original
does; as "permuted" each sees its own, which is what training does (neo_jax/model/route.py). A dense case is
also run as "copied", a routed model whose visual weights equal the text's: EVEv2's start after its stage 0.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipelines import schema
from neo_jax.convert.evev2 import EVEV2
from neo_jax.model.route import is_visual
from tests.neo_jax import eve_rows, recordings
from tests.neo_jax.recordings import Recording

pytestmark = pytest.mark.golden
CASES = [path for path in recordings.cases("evev2") if "out.loss" in load_file(path)]
DECODED = [path for path in recordings.cases("evev2") if "out.greedy_ids" in load_file(path)]
COPIED = {
    "layernorm": ("input_layernorm", "post_attention_layernorm"),
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("mlp",),
}
# What the end of a case's name says about its model (the recordings' README).
VARIANTS = {"shared_norms": {"moe_part": "self_attn-mlp"}, "dense_stage0": {"add_moe": False}}


def hf_config(recorded, stem):
    """The config.json that the recorded dimensions stand for; the name of a case says its variant."""
    dims, processor = recorded["dims"], recorded["preprocessor"]
    hf = recorded["qwen2"] | {
        "model_type": "eve-qwen2",
        "architectures": ["EVEQwen2ForCausalLM"],
        "vocab_size": dims["vocab"],
        "hidden_size": dims["hidden"],
        "intermediate_size": dims["inter"],
        "num_hidden_layers": dims["layers"],
        "num_attention_heads": dims["heads"],
        "num_key_value_heads": dims["kv"],
        "mm_hidden_size": dims["mm"],
        "patch_stride": processor["patch_stride"],
        "dense_stride": processor["dense_stride"],
        "add_moe": recorded["add_moe"],
        "moe_part": recorded["moe_part"],
    }
    for variant, changes in VARIANTS.items():
        hf |= changes if stem.endswith(variant) else {}
    return hf


def inputs(path):
    """The tensors of the case that holds this one's inputs: itself, or the one that its name extends."""
    case = load_file(path)
    if "in.image.0" in case:
        return case
    others = [other for other in recordings.cases("evev2") if path.stem.startswith(f"{other.stem}_")]
    return inputs(max(others, key=lambda other: len(other.stem)))


def load(path, form):
    """A case in one of the FORMS."""
    recorded = json.loads((path.parent / "config.json").read_text())
    hf, processor = hf_config(recorded, path.stem), recorded["preprocessor"]
    if form == "copied":
        hf |= {"add_moe": True}
    # The weights of all cases are in one file; a variant with fewer parts knows fewer of them.
    parts = hf["moe_part"].split("-") if hf["add_moe"] else []
    modules = [module for part in parts for module in COPIED[part]]
    family = EVEV2._replace(
        canonical=lambda name: (
            name if "moe_" not in name or any(f"moe_{module}" in name for module in modules) else None
        )
    )
    norm = {f"embed.pixel_{name}": tuple(processor[f"image_{name}"]) for name in ("mean", "std")}
    case, side = inputs(path), hf["patch_stride"] * hf["dense_stride"]
    count = sum(name.startswith("in.image.") for name in case)
    pixels = [case[f"in.image.{i}"].transpose(1, 2, 0) for i in range(count)]
    images = [eve_rows.cut(recordings.uint8_pixels(image, *norm.values()), side) for image in pixels]
    batch = eve_rows.table(case, images, recorded["image_token_index"])
    if form != "permuted":
        recording = Recording(path, family, hf, **norm)
        recording.batch = batch
    else:
        padded, share = two_budgets(batch)
        recording = Recording(path, family, hf, **norm, **{"route.visual_share": share})
        recording.batch = padded
        assert recording.model.routes and recording.model.visual_share == share
        out, length = recording.outputs, batch["tokens"].shape[1]
        out |= {name: out[name][:, :length] for name in ("embeds", "final", "logits")}
        out["layers"] = out["layers"][:, :, :length]
        recording.batch = batch
    if form == "copied":
        recording.params = {
            name: recording.params[name.replace("/visual/", "/text/")] for name in recording.params
        }
    recording.images, recording.form, recording.family = images, form, EVEV2
    return recording


def two_budgets(batch):
    """The batch with padding so that every row keeps both budgets of one cut, and the visual side's share."""
    kinds = np.asarray(batch["kinds"])
    visual = np.asarray(is_visual(kinds)).sum(axis=1)
    text = (kinds != schema.PAD).sum(axis=1) - visual
    length = int(text.max() + visual.max())
    extra = length - kinds.shape[1]
    assert extra >= 0

    def padded(name, x):
        if name in recordings.PER_PATCH:
            return x
        fill = -1 if name == "patch_index" else 0
        return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)

    return {name: padded(name, x) for name, x in batch.items()}, float(visual.max() / length)


def forms(path):
    return ("dense", "copied") if path.stem.endswith("dense_stage0") else ("blend", "permuted")


@pytest.fixture(
    scope="module",
    params=[(path, form) for path in CASES for form in forms(path)],
    ids=lambda param: f"{param[0].stem}-{param[1]}",
)
def recording(request):
    return load(*request.param)


def test_patch_embedding(recording):
    if "in.image.0" not in recording.case:
        return  # the inputs of another case
    batch = eve_rows.one_image_a_row(recording.images)

    @jax.jit
    def run(params):
        layer = recording.bound(params).patch_embed
        return layer.patch(layer.pixels(batch["patches"])), layer(batch)

    convolved, features = map(np.asarray, run(recording.params))
    m = recording.config.embed.merge_size
    for i, (squares, places) in enumerate(recording.images):
        h, w = places[-1] + 1
        chw = convolved[i, : len(squares)].reshape(h, w, m, m, -1).transpose(4, 0, 2, 1, 3)
        recording.close(f"out.image.{i}.conv1_chw", chw.reshape(-1, h * m, w * m))
        recording.close(f"out.image.{i}.features", features[i, : 1 + h * (w + 1)])


def test_routing(recording):
    """Class and row vectors count as visual, padding as text."""
    visual = np.asarray(is_visual(recording.batch["kinds"]), np.float32)
    recording.compared.add("out.visual_token_mask")
    np.testing.assert_array_equal(visual[..., None], recording.case["out.visual_token_mask"])


def test_hidden_states_and_logits(recording):
    recording.check_hidden_states_and_logits()


def test_loss_and_gradients(recording):
    if recording.form != "copied":
        return recording.check_loss_and_gradients()
    for value, gradients in recording.outputs["losses"]:
        recording.close("out.loss", value)
        recording.close("out.loss_f64", value, group="out.loss")
        assert all(float(jnp.abs(g).max()) > 0 for name, g in gradients.items() if "/visual/" in name)
    return None


def test_everything_recorded_is_compared(recording):
    test_patch_embedding(recording)
    test_routing(recording)
    test_hidden_states_and_logits(recording)
    test_loss_and_gradients(recording)
    assert not recording.uncompared()


def test_cached_decoding(recording):
    """Single tokens after an image take the text weights."""
    if recording.form in ("blend", "dense"):
        recording.check_decoding()


@pytest.mark.parametrize("path", DECODED, ids=lambda path: path.stem)
def test_greedy_decoding(path):
    recording = load(path, "blend")
    case, batch = recording.case, recording.batch
    length, steps = batch["tokens"].shape[1], len(case["out.greedy_ids"])

    @jax.jit
    def run(params):
        model = recording.bound(params)
        hidden, caches = model.prefill(batch, cache_size=length + steps)

        def step(carry, slot):
            token, caches = carry
            coords = jnp.zeros((1, 1, 3)).at[..., 0].set(slot.astype(jnp.float32))
            hidden, caches = model.extend(token, coords, slot[None, None], caches)
            logits = model.logits(hidden[:, -1])
            return (jnp.argmax(logits, -1).astype(jnp.int32)[None], caches), (token[0, 0], logits[0])

        first = jnp.argmax(model.logits(hidden[:, -1]), -1).astype(jnp.int32)[None]
        return jax.lax.scan(step, (first, caches), length + jnp.arange(steps, dtype=jnp.int32))[1]

    tokens, logits = run(recording.params)
    np.testing.assert_array_equal(tokens, case["out.greedy_ids"])
    # What was recorded are the logits after feeding each of the ids.
    recordings.close(logits, case["out.step_logits"], recordings.tolerance(recording.folder, "out.logits"))


def test_weights_round_trip(recording):
    if recording.form != "copied":
        recording.check_round_trip()


def test_config_round_trip(recording):
    if recording.form != "permuted":
        recording.check_config_round_trip({})
