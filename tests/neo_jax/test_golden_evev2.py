"""EVEv2 against recordings of the original (tests/golden/evev2): routed both ways, shared norms, dense.

Every routed case is run in two forms. As "blend" both branches see all tokens, which is what the original
does; as "permuted" each sees its own, which is what training does (neo_jax/model/route.py). A dense case is
also run as "copied", a routed model whose visual weights equal the text's: EVEv2's start after its stage 0.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipelines import schema
from neo_jax import params as params_lib
from neo_jax.convert.recordings import evev2_images
from neo_jax.model.route import is_visual
from tests.neo_jax import recordings
from tests.neo_jax.recordings import Recording

pytestmark = pytest.mark.golden
CASES = [path for path in recordings.cases("evev2") if "out.loss" in load_file(path)]
DECODED = [path for path in recordings.cases("evev2") if "out.greedy_ids" in load_file(path)]


def load(path, form):
    """A case in one of the FORMS."""
    recording = Recording(path, **({"add_moe": True} if form == "copied" else {}))
    recording.form = form
    if form == "permuted":
        recording.shape, recording.config.route.visual_share = one_cut(recording)
        assert recording.model.routes and recording.model.visual_share
    if form == "copied":
        dense = recording.weights
        named = {row.name: row for row in recording.family.table(recording.config)}
        recording.weights = {name: dense[name.replace("moe_", "")] for name in named}
    return recording


def one_cut(recording):
    """Rows so long that those of all cases keep both budgets of one cut: (shape, the visual side's share)."""
    kinds = [recordings.batch_of(path)["kinds"] for path in CASES]
    visual = max(int(is_visual(x).sum(axis=1).max()) for x in kinds)
    text = max(int(((x != schema.PAD) & ~is_visual(x)).sum(axis=1).max()) for x in kinds)
    B, L, P = recording.shape
    assert text + visual >= L
    return (B, text + visual, P), visual / (text + visual)


def forms(path):
    return ("dense", "copied") if path.stem.endswith("dense_stage0") else ("blend", "permuted")


@pytest.fixture(
    scope="module",
    params=[(path, form) for path in CASES for form in forms(path)],
    ids=lambda param: f"{param[0].stem}-{param[1]}",
)
def recording(request):
    return load(*request.param)


@functools.partial(jax.jit, static_argnums=0)
def patch_embedding(model, params, batch):
    layer = params_lib.bind(model, params).patch_embed
    return layer.patch(layer.pixels(batch["patches"])), layer(batch)


def test_patch_embedding(recording):
    if "in.image.0" not in recording.case:
        return  # the inputs of another case
    images = evev2_images(recording.case, recording.config)
    with_images = [load_file(path) for path in CASES if "in.image.0" in load_file(path)]
    rows = [recordings.one_image_a_row(evev2_images(case, recording.config)) for case in with_images]
    batch = recordings.padded(recordings.one_image_a_row(images), recordings.common_shape(rows))
    convolved, features = map(np.asarray, patch_embedding(recording.model, recording.params, batch))
    m = recording.config.embed.merge_size
    for i, (squares, places) in enumerate(images):
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
    for value, _, gradients in recording.outputs["losses"]:
        recording.close("out.loss", value)
        recording.close("out.loss_f64", value, group="out.loss")
        assert all(float(np.abs(g).max()) > 0 for name, g in gradients.items() if "/visual/" in name)
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
