"""EVE v1 and its patch aligning layer against recordings of the original (tests/golden/eve)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file, save_file

from configs import base
from neo_jax import config as config_lib, objectives, params as params_lib, restore, step as step_lib
from neo_jax.convert import eve, import_, table as table_lib
from neo_jax.convert.recordings import eve_band, eve_images
from neo_jax.errors import UserError
from neo_jax.model import local_attention
from neo_jax.objectives import distill
from tests.neo_jax import recordings
from tests.neo_jax.recordings import Recording

pytestmark = pytest.mark.golden
CASES = recordings.cases("eve")


class Eve(Recording):
    """A case with its objectives: the config of a training stage, and the teacher's features in the batch."""

    def __init__(self, path):
        super().__init__(path)
        self.aligns = "out.loss_clip" in self.case
        embed = self.config.embed
        self.side, self.placeholder = embed.patch_size * embed.merge_size, self.recorded["image_token_index"]
        whole = self.whole = base.get_config()
        whole.model = self.config
        whole.objectives.distill.every = self.recorded["pal_layer_rate"]
        whole.objectives.distill.teacher_size = self.recorded["dims"]["clip"]
        whole.data.vocab_size = self.config.vocab_size
        kinds = {"ntp": 1.0, "distill": 1.0 if self.aligns else 0.0}
        stage = base.stage(1, warmup_steps=0, objectives=kinds)
        if self.aligns:
            teacher_grid = round(self.case["in.teacher_features"].shape[1] ** 0.5)
            stage.teacher_ratio = self.case["in.images"].shape[-1] // self.side // teacher_grid
        whole.stages, whole.stage.golden = ("golden",), stage
        self.stage = stage
        self.rows = [*eve.table(self.config), *(eve.heads(whole) if self.aligns else ())]
        if self.aligns:
            self.weights = load_file(self.folder / "weights.safetensors")
        self.images = eve_images(self.case, self.config)
        if self.aligns:
            self.batch = self.batch | {"teacher_features": self.teacher_features()}

    @property
    def model(self):
        return trained_model(FrozenConfigDict(self.whole))

    @property
    def specs(self):
        return params_lib.abstract(self.model)

    @functools.cached_property
    def params(self):
        return table_lib.from_hf(self.specs, self.rows, self.weights)

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
                    down, across = eve_band(self.case["in.images"][index], self.config)
                    top, left = down.start // self.side, across.start // self.side
                    cell = (top + h) // ratio * grid + (left + w) // ratio
                    features[row, patch] = teacher[index, cell]
        return features


@functools.cache
def trained_model(config):
    """One object for equal configs: compiled programs know models by identity."""
    return objectives.build(config)


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def recording(request):
    return Eve(request.param)


@pytest.fixture(scope="module")
def results(recording):
    """The stream, losses and both kinds of gradients, out of one compilation for cases of one stage."""
    shape = recordings.common_shape(map(recordings.batch_of, CASES))
    stage = FrozenConfigDict(recording.stage)
    out = run(recording.model, stage, recording.params, recordings.padded(recording.batch, shape))
    cropped = {"logits": recording.cropped(out["logits"])}
    cropped["taps"] = {layer: recording.cropped(x) for layer, x in out["taps"].items()}
    return out | cropped


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(model, stage, params, batch):
    heads = model.objectives.names if hasattr(model, "objectives") else ()

    def losses(params):
        sums = step_lib.loss_sums(params_lib.bind(model, params), batch, 1, stage)
        return {name: loss / sums["objective_weight"][name] for name, loss in sums["objective_loss"].items()}

    bound = params_lib.bind(model, params)
    final, taps, _ = bound.taps(batch, range(sum(model.depths) + 1))
    values, pull = jax.vjp(losses, params)
    # Of the sum of all, and of the heads' alone; one after the other through one backward pass.
    of_all, of_heads = dict.fromkeys(values, 1.0), {name: float(name in heads) for name in values}
    pairs = {name: jnp.array([of_all[name], of_heads[name]]) for name in values}
    gradients = jax.lax.map(lambda weights: pull(weights)[0], pairs)
    return {
        "taps": taps,
        "logits": bound.logits(final),
        "students": bound.objectives.distill.predict(batch, taps, stage) if heads else None,
        "losses": values,
        "grad": {path: g[0] for path, g in gradients.items()},
        "gradclip": {path: g[1] for path, g in gradients.items()},
    }


@functools.partial(jax.jit, static_argnums=0)
def patch_embedding(model, params, batch):
    layer = params_lib.bind(model, params).patch_embed
    convolved = layer.convolve(batch)
    pooled = layer.pool_patches(convolved)
    classes = layer.pool_images(pooled, local_attention.image_of_patch(batch))[:, 1]
    return convolved, pooled, classes, layer.before_projector(batch, pooled), layer(batch)


def test_patch_embedding(recording):
    case, embed = recording.case, recording.config.embed
    assert embed.hidden_size == case["out.image.0.local_attn"].shape[-1]
    rows = [recordings.one_image_a_row(eve_images(load_file(path), recording.config)) for path in CASES]
    batch = recordings.one_image_a_row(recording.images)
    batch = recordings.padded(batch, recordings.common_shape(rows))
    outputs = patch_embedding(recording.model, recording.params, batch)
    convolved, pooled, classes, before, features = map(np.asarray, outputs)
    m = embed.merge_size
    for i, (squares, places) in enumerate(recording.images):
        h, w = places[-1] + 1
        chw = convolved[i, : len(squares)].reshape(h, w, m, m, -1).transpose(4, 0, 2, 1, 3)
        recording.close(f"out.image.{i}.conv_chw", chw.reshape(-1, h * m, w * m))
        recording.close(f"out.image.{i}.local_attn", pooled[i, : len(squares)])
        recording.close(f"out.image.{i}.global_attn_cls", classes[i])
        length = 1 + h * (w + 1)
        recording.close(f"out.image.{i}.pre_projector", before[i, :length])
        recording.close(f"out.image.{i}.features", features[i, :length])
    assert f"out.image.{len(recording.images)}.features" not in case


def test_hidden_states_and_logits(recording, results):
    case = recording.case
    assert recording.batch["tokens"].shape == case["out.inputs_embeds"].shape[:2]
    num_layers = recording.config.num_layers
    assert f"out.hidden.{num_layers}" in case and f"out.hidden.{num_layers + 1}" not in case
    expected = {f"out.hidden.{layer}": tap for layer, tap in results["taps"].items()}
    expected |= {"out.inputs_embeds": results["taps"][0], "out.logits": results["logits"]}
    for name, actual in expected.items():
        recording.close(name, actual)


def test_losses(recording, results):
    losses = results["losses"]
    recording.close("out.loss_total", sum(losses.values()))
    recording.close("out.loss_total_f64", sum(losses.values()), group="out.loss_total")
    np.testing.assert_allclose(sum(losses.values()), recording.case["out.loss_total_f64"][0], rtol=2e-6)
    if recording.aligns:
        recording.close("out.loss_llm", losses["ntp"])
        recording.close("out.loss_clip", losses["distill"])


def test_aligning_layer(recording, results):
    """Students and teachers as they enter the cosine.

    In a sample without image both are the student of its first positions, padding included: their hidden
    states, which mean nothing, are taken from the recording.
    """
    if not recording.aligns:
        return
    assert distill.NUM_HEADS == local_attention.NUM_HEADS == recording.recorded["heads_in_pel_and_pal"]
    head, case = recording.bound().objectives.distill, recording.case
    students = np.asarray(results["students"])
    for row, index in enumerate(recording.of_image()):
        if index is None:
            count = len(case[f"out.pal.{row}.student"])
            start = [case[f"out.hidden.{layer}"][row, :count] for layer in head.layers]
            student = jax.jit(head.student)(start)
            recording.close(f"out.pal.{row}.student", student)
            recording.close(f"out.pal.{row}.teacher", student)
            continue
        places = recording.images[index][1]
        first = np.flatnonzero((places % recording.stage.teacher_ratio == 0).all(axis=1))
        recording.close(f"out.pal.{row}.student", students[row, first])
        shown = recording.batch["teacher_features"][row, first]
        np.testing.assert_array_equal(shown, case[f"out.pal.{row}.teacher"])
        recording.close(f"out.pal.{row}.teacher", shown)


@pytest.mark.parametrize("kind", ["grad", "gradclip"])
def test_gradients(recording, results, kind):
    recorded = {name: name.partition(".")[2] for name in recording.case if name.startswith(f"{kind}.")}
    assert bool(recorded) == (kind == "grad" or recording.aligns)
    if recorded:
        ours = table_lib.to_hf(recording.rows, results[kind])
        for name, tensor in recorded.items():
            recording.close(name, ours[tensor])


def test_everything_recorded_is_compared(recording, results):
    test_patch_embedding(recording)
    test_hidden_states_and_logits(recording, results)
    test_losses(recording, results)
    test_aligning_layer(recording, results)
    for kind in ("grad", "gradclip"):
        test_gradients(recording, results, kind)
    assert not recording.uncompared()


def test_weights_round_trip(recording):
    back = table_lib.to_hf(recording.rows, recording.params)
    assert set(back) == set(recording.weights)
    for name, tensor in recording.weights.items():
        np.testing.assert_array_equal(back[name], tensor)


def folder_of_training(recording, folder):
    """The recorded weights as a checkpoint of training: with the teacher, which is stored twice."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(recording.hf | {"model_type": "eve"}))
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
    config = config_lib.resolve(recording.whole)
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
    config = config_lib.resolve(recording.whole)
    with pytest.raises(UserError, match=f"lacks 1 tensors that config.objectives asks for, first {name}"):
        import_.run(hf, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
