"""EVE v1 and its patch aligning layer against recordings of the original (tests/golden/eve)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from data_pipelines import schema
from neo_jax import config as config_lib, objectives, params as params_lib, restore, step as step_lib
from neo_jax.convert import eve, import_, table as table_lib
from neo_jax.errors import UserError
from neo_jax.model import local_attention
from neo_jax.objectives import distill
from tests.neo_jax import eve_rows, recordings
from tests.neo_jax.recordings import close

pytestmark = pytest.mark.golden
CASES = recordings.cases("eve")
TEXT_ONLY_GRID = (
    16  # patches per side that the original shows of an image with an empty mask (specs: EVE 2.3)
)


def hf_config(recorded):
    """The config.json that the recorded dimensions stand for."""
    dims = recorded["dims"]
    return recorded["llama"] | {
        "architectures": ["EVELlamaForCausalLM"],
        "vocab_size": dims["vocab"],
        "hidden_size": dims["hidden"],
        "intermediate_size": dims["inter"],
        "num_hidden_layers": dims["layers"],
        "num_attention_heads": dims["heads"],
        "mm_hidden_size": dims["mm"],
        "patch_stride": dims["patch"],
        "conv_stride": dims["conv"],
    }


class Recording:
    """One recorded case: a config, weights, a batch, and every number that the case has a recording of."""

    def __init__(self, path):
        self.folder, self.case = path.parent, load_file(path)
        recorded = json.loads((path.parent / "config.json").read_text())
        hf = hf_config(recorded)
        assert eve.matches(hf)
        self.aligns = "out.loss_clip" in self.case
        side = recorded["dims"]["patch"] * recorded["dims"]["conv"]
        self.side, self.placeholder = side, recorded["image_token_index"]
        config = self.config = base.get_config()
        config.model.update_from_flattened_dict(eve.model_changes(hf))
        for name in ("mean", "std"):
            config.model.embed[f"pixel_{name}"] = tuple(recorded[f"image_{name}"])
        config.objectives.distill.every = recorded["pal_layer_rate"]
        config.objectives.distill.teacher_size = recorded["dims"]["clip"]
        config.data.vocab_size = config.model.vocab_size
        kinds = {"ntp": 1.0, "distill": 1.0 if self.aligns else 0.0}
        stage = base.stage(1, warmup_steps=0, objectives=kinds)
        if self.aligns:
            teacher_grid = round(self.case["in.teacher_features"].shape[1] ** 0.5)
            stage.teacher_ratio = self.case["in.images"].shape[-1] // side // teacher_grid
        config.stages, config.stage.golden = ("golden",), stage
        self.stage = stage

        self.model = objectives.build(config)
        self.specs = params_lib.abstract(self.model)
        self.rows = [*eve.table(config.model), *(eve.heads(config) if self.aligns else ())]
        weights = load_file(path.parent / "weights.safetensors")
        if not self.aligns:
            weights = {name: x for name, x in weights.items() if eve.canonical(name) is not None}
        self.weights = weights
        self.params = table_lib.from_hf(self.specs, self.rows, weights)
        self.bands = [self.band(image) for image in self.case["in.images"]]
        self.images = [eve_rows.cut(self.pixels(i), side) for i in range(len(self.bands))]
        self.batch = eve_rows.table(self.case, self.images, self.placeholder)
        if self.aligns:
            self.batch["teacher_features"] = self.teacher_features()

    def band(self, image):
        """(first row, last row, first column, last column) of the pixels that the mask shows."""
        places = np.argwhere(image[3] > 0)
        if not len(places):
            size = min(TEXT_ONLY_GRID * self.config.model.embed.patch_size, image.shape[1])
            return 0, size, 0, size
        (top, left), (bottom, right) = places.min(0), places.max(0) + 1
        assert (image[3, top:bottom, left:right] == 1).all()
        return top, bottom, left, right

    def pixels(self, index):
        top, bottom, left, right = self.bands[index]
        embed = self.config.model.embed
        shown = self.case["in.images"][index, :3, top:bottom, left:right].transpose(1, 2, 0)
        return recordings.uint8_pixels(shown, embed.pixel_mean, embed.pixel_std)

    def of_image(self):
        """Index of the row's image in in.images, None for a row that shows none (one image at most)."""
        return [
            index if self.placeholder in ids else None for index, ids in enumerate(self.case["in.input_ids"])
        ]

    def teacher_features(self):
        """Every teacher feature in the row of its cell's upper left patch; noise where nothing is read."""
        teacher, ratio = self.case["in.teacher_features"], self.stage.teacher_ratio
        grid = round(teacher.shape[1] ** 0.5)
        shape = (*self.batch["patches"].shape[:2], teacher.shape[-1])
        features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for row, index in enumerate(self.of_image()):
            for patch, (h, w) in enumerate(self.images[index][1] if index is not None else ()):
                if h % ratio == 0 and w % ratio == 0:
                    top, _, left, _ = np.array(self.bands[index]) // self.side
                    cell = (top + h) // ratio * grid + (left + w) // ratio
                    features[row, patch] = teacher[index, cell]
        return jnp.asarray(features)

    def bound(self, params=None):
        return params_lib.bind(self.model, self.params if params is None else params)

    def close(self, actual, name):
        close(actual, self.case[name], recordings.tolerance(self.folder, name))


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def recording(request):
    return Recording(request.param)


@pytest.fixture(scope="module")
def results(recording):
    """The stream, losses and both kinds of gradients, out of one compilation."""
    layers = range(recording.config.model.num_layers + 1)

    @jax.jit
    def run(params, batch):
        def losses(params):
            sums = step_lib.loss_sums(recording.bound(params), batch, 1, recording.stage)
            pairs = {
                name: (loss, sums["objective_weight"][name]) for name, loss in sums["objective_loss"].items()
            }
            return {name: loss / weight for name, (loss, weight) in pairs.items()}

        model = recording.bound(params)
        final, taps = model.taps(batch, layers)
        values, pull = jax.vjp(losses, params)
        ones = dict.fromkeys(values, jnp.ones(()))
        return {
            "taps": taps,
            "logits": model.logits(final),
            "students": model.objectives.distill.predict(batch, taps, recording.stage)
            if recording.aligns
            else None,
            "losses": values,
            "grad": pull(ones)[0],
            "gradclip": pull(ones | {"ntp": jnp.zeros(())})[0] if recording.aligns else {},
        }

    return run(recording.params, recording.batch)


def real(recording, x):
    """The positions that are no padding."""
    return np.asarray(x)[np.asarray(recording.batch["kinds"]) != schema.PAD]


def test_patch_embedding(recording):
    case, embed = recording.case, recording.config.model.embed
    assert embed.hidden_size == case["out.image.0.local_attn"].shape[-1]
    batch = eve_rows.one_image_a_row(recording.images)

    @jax.jit
    def run(params):
        layer = recording.bound(params).patch_embed
        convolved = layer.convolve(batch)
        pooled = layer.pool_patches(convolved)
        classes = layer.pool_images(pooled, local_attention.image_of_patch(batch))[:, 1]
        return convolved, pooled, classes, layer.before_projector(batch, pooled), layer(batch)

    convolved, pooled, classes, before, features = map(np.asarray, run(recording.params))
    m = embed.merge_size
    for i, (squares, places) in enumerate(recording.images):
        h, w = places[-1] + 1
        chw = convolved[i, : len(squares)].reshape(h, w, m, m, -1).transpose(4, 0, 2, 1, 3)
        recording.close(chw.reshape(-1, h * m, w * m), f"out.image.{i}.conv_chw")
        recording.close(pooled[i, : len(squares)], f"out.image.{i}.local_attn")
        recording.close(classes[i], f"out.image.{i}.global_attn_cls")
        length = 1 + h * (w + 1)
        recording.close(before[i, :length], f"out.image.{i}.pre_projector")
        recording.close(features[i, :length], f"out.image.{i}.features")
    assert f"out.image.{len(recording.images)}.features" not in case


def test_hidden_states_and_logits(recording, results):
    case = recording.case
    assert recording.batch["tokens"].shape == case["out.inputs_embeds"].shape[:2]
    num_layers = recording.config.model.num_layers
    assert f"out.hidden.{num_layers}" in case and f"out.hidden.{num_layers + 1}" not in case
    expected = {f"out.hidden.{layer}": tap for layer, tap in results["taps"].items()}
    expected |= {"out.inputs_embeds": results["taps"][0], "out.logits": results["logits"]}
    for name, actual in expected.items():
        close(
            real(recording, actual),
            real(recording, case[name]),
            recordings.tolerance(recording.folder, name),
        )


def test_losses(recording, results):
    losses = results["losses"]
    recording.close(sum(losses.values()), "out.loss_total")
    np.testing.assert_allclose(sum(losses.values()), recording.case["out.loss_total_f64"][0], rtol=2e-6)
    if recording.aligns:
        recording.close(losses["ntp"], "out.loss_llm")
        recording.close(losses["distill"], "out.loss_clip")


def test_aligning_layer(recording, results):
    """Students and teachers as they enter the cosine.

    In a sample without image both are the student of its first positions, padding included: their hidden
    states, which mean nothing, are taken from the recording.
    """
    if not recording.aligns:
        return
    assert (
        distill.NUM_HEADS
        == local_attention.NUM_HEADS
        == json.loads((recording.folder / "config.json").read_text())["heads_in_pel_and_pal"]
    )
    head, case = recording.bound().objectives.distill, recording.case
    students = np.asarray(results["students"])
    for row, index in enumerate(recording.of_image()):
        if index is None:
            count = len(case[f"out.pal.{row}.student"])
            start = [case[f"out.hidden.{layer}"][row, :count] for layer in head.layers]
            student = jax.jit(head.student)(start)
            recording.close(student, f"out.pal.{row}.student")
            recording.close(student, f"out.pal.{row}.teacher")
            continue
        places = recording.images[index][1]
        first = np.flatnonzero((places % recording.stage.teacher_ratio == 0).all(axis=1))
        recording.close(students[row, first], f"out.pal.{row}.student")
        np.testing.assert_array_equal(
            np.asarray(recording.batch["teacher_features"])[row, first], case[f"out.pal.{row}.teacher"]
        )


@pytest.mark.parametrize("kind", ["grad", "gradclip"])
def test_gradients(recording, results, kind):
    recorded = {name: name.partition(".")[2] for name in recording.case if name.startswith(f"{kind}.")}
    assert bool(recorded) == (kind == "grad" or recording.aligns)
    if recorded:
        ours = table_lib.to_hf(recording.rows, results[kind])
        for name, tensor in recorded.items():
            recording.close(ours[tensor], name)


def test_weights_round_trip(recording):
    back = table_lib.to_hf(recording.rows, recording.params)
    assert set(back) == set(recording.weights)
    for name, tensor in recording.weights.items():
        np.testing.assert_array_equal(back[name], tensor)


def folder_of_training(recording, folder):
    """The recorded weights as a checkpoint of training: with the teacher, which is stored twice."""
    folder.mkdir()
    hf = hf_config(json.loads((recording.folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(hf | {"model_type": "eve"}))
    teacher = {
        f"model.{place}.backbone.{name}": np.ones((2, 3), np.float32)
        for place in ("vision_clip", "vision_tower_compressor.clip_layer")
        for name in ("embeddings.weight", "layers.0.q.bias")
    }
    save_file(load_file(recording.folder / "weights.safetensors") | teacher, folder / "model.safetensors")
    return folder


def test_import_of_a_checkpoint_of_training(recording, tmp_path):
    """The teacher is left out; the aligning layer is taken where the config has the objective."""
    hf = folder_of_training(recording, tmp_path / "hf")
    config = config_lib.resolve(recording.config)
    import_.run(hf, tmp_path / "run", config)
    imported = restore.checkpoint_folder(tmp_path / "run")
    assert restore.param_shapes(imported) == {path: x.shape for path, x in recording.params.items()}
    source = import_.Source(hf)
    source.take_heads(config)
    for path, values in recording.params.items():
        np.testing.assert_array_equal(source.load(path), values)


def test_half_an_aligning_layer_is_refused(recording, tmp_path):
    if not recording.aligns:
        return
    hf = folder_of_training(recording, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    name = f"{eve.COMPRESSOR}output_layer.bias"
    save_file({other: x for other, x in tensors.items() if other != name}, hf / "model.safetensors")
    config = config_lib.resolve(recording.config)
    with pytest.raises(UserError, match=f"lacks 1 tensors that config.objectives asks for, first {name}"):
        import_.run(hf, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
