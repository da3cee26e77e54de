"""Distillation: against a loop over images, in a step beside next-token prediction, and learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from configs import base, eve_7b
from data_pipelines import pack
from neo_jax import (
    config as config_lib,
    mesh as mesh_lib,
    objectives,
    params as params_lib,
    start,
    step as step_lib,
)
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from neo_jax.preflight import program
from neo_jax.stages import Stage
from tests.neo_jax import rows

SIZE = 16  # teacher channels


def make_config(accumulate=1, **stage):
    """A tiny model that is tapped at layers 3, 1 (and not at the embeddings)."""
    config = base.get_config()
    config.model = rows.tiny_model()
    config.data.vocab_size = 64
    config.objectives.distill.update(teacher_size=SIZE, every=2)
    budgets = {"batch_size": 4, "row_tokens": 40, "row_patches": 16, "max_pixels": 64, "min_pixels": 64}
    # This epsilon keeps Adam from blowing up the rounding of gradients that are almost zero.
    rates = {"warmup_steps": 0, "peak_lr": 1e-2, "adam_eps": 1e-3, "accumulate": accumulate}
    objective = {"objectives": {"ntp": 1.0, "distill": 0.5}}
    config.stage.only = base.stage(30, **budgets | rates | objective | stage)
    config.stages = ("only",)
    return config_lib.resolve(config)


def make_batch(seed=0, **sizes):
    batch = rows.batch(seed, **sizes)
    shape = (*batch["patches"].shape[:2], SIZE)
    features = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return {name: jnp.asarray(x) for name, x in batch.items()} | {"teacher_features": jnp.asarray(features)}


class Setup:
    """A model with its head, and a jitted step of its only stage."""

    def __init__(self, config):
        self.config, self.model = config, objectives.build(config)
        self.specs = params_lib.abstract(self.model)
        self.stage = Stage("only", 0, 0, 30, config.stage.only)
        self.trainable = params_lib.select(self.specs, config.stage.only.trainable)
        params = jax.jit(lambda key: params_lib.init(self.specs, key))(jax.random.key(0))
        self.state = step_lib.initial_state(params, self.specs, self.stage, self.trainable)
        self.step = jax.jit(
            step_lib.make_train_step(self.model, self.specs, self.stage, self.trainable, num_sources=3)
        )


@pytest.fixture(scope="module")
def setup():
    return Setup(make_config())


def loop_loss(head, batch, taps, ratio):
    """The definition, image by image, as in specs: EVE 2.5; returns (sum over images, images)."""
    batch, taps = jax.tree.map(np.asarray, (dict(batch), taps))
    total, count = 0.0, 0
    for row, image_ids in enumerate(batch["image_ids"]):
        for number in range(1, image_ids.max() + 1):
            shown = np.flatnonzero((image_ids == number) & (batch["patch_index"][row] >= 0))
            patches = batch["patch_index"][row][shown]
            h, w = batch["patch_hw"][row][patches].max(0) + 1
            teacher = batch["teacher_features"][row][patches].reshape(h, w, -1)
            cells = [(i, j) for i in range(h // ratio) for j in range(w // ratio)]
            if not cells:
                continue
            cosines = []
            for i, j in cells:
                inside = np.s_[i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio]
                vectors = [taps[k][row][shown].reshape(h, w, -1)[inside].mean((0, 1)) for k in head.layers]
                student, target = np.asarray(head.student(vectors)), teacher[i * ratio, j * ratio]
                cosines.append(student @ target / np.linalg.norm(student) / np.linalg.norm(target))
            total, count = total + 1 - np.mean(cosines), count + 1
    return total, count


@settings(max_examples=8, deadline=None)
@given(
    grids=st.lists(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=2), min_size=2, max_size=2
    ),
    ratio=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_loss_equals_a_loop_over_images(setup, grids, ratio, seed):
    rng = np.random.default_rng(seed)
    documents = [[rows.document(rng, grid, words=(2, 3, 3)[: len(grid) + 1])] for grid in grids]
    batch = pack.stack(documents, 2, 50, 32, rows.PATCH_DIM)
    batch["teacher_features"] = rng.normal(size=(2, 32, SIZE)).astype(np.float32)
    taps = {layer: rng.normal(size=(2, 50, 32)).astype(np.float32) for layer in (3, 1)}
    head = params_lib.bind(setup.model, setup.state.params).objectives.distill
    expected, count = loop_loss(head, batch, taps, ratio)
    stage = base.stage(1, teacher_ratio=ratio)
    actual, weight = head.loss(batch, taps, stage), head.weight(batch, stage)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert int(weight) == count


@pytest.fixture(scope="module")
def first_step(setup):
    return setup.step(setup.state, make_batch())


def test_every_objective_has_a_value_and_a_gradient_on_its_taps(setup):
    """In the patch embedding, which both reach, and in every part of the head that is its own."""
    batch = make_batch()

    def losses(params):
        sums = step_lib.loss_sums(params_lib.bind(setup.model, params), batch, 3, setup.stage.config)
        return sums["objective_loss"]

    values, pull = jax.vjp(jax.jit(losses), setup.state.params)
    for name, value in values.items():
        assert float(value) > 0
        (gradients,) = pull({other: jnp.float32(other == name) for other in values})
        reached = {path for path, g in gradients.items() if float(jnp.abs(g).max()) > 0}
        head = {path for path in setup.specs if path.startswith("objectives/distill/")}
        assert "patch_embed/merge/weight" in reached
        assert reached & head == (head if name == "distill" else set())
        assert ("head" in reached) == (name == "ntp")


def test_loss_is_the_weighted_sum(first_step):
    _, metrics = first_step
    ntp, aligning = metrics["objectives"]["ntp"], metrics["objectives"]["distill"]
    assert 0 < aligning < 2
    np.testing.assert_allclose(metrics["loss"], ntp + 0.5 * aligning, rtol=1e-6)


def test_accumulated_equals_one_batch(first_step):
    """Parts that hold unequal shares of the images and words."""
    state, metrics = first_step
    other = Setup(make_config(accumulate=4))
    parted, parted_metrics = other.step(other.state, make_batch())
    np.testing.assert_allclose(parted_metrics["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(parted_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    for path, x in parted.params.items():
        np.testing.assert_allclose(x, state.params[path], atol=2e-5, err_msg=path)


def test_a_stage_of_distillation_alone_learns_and_moves_what_it_names():
    setup = Setup(
        make_config(objectives={"distill": 1.0}, trainable=("patch_embed/.*", "objectives/distill/.*"))
    )
    state, losses = setup.state, []
    for _ in range(30):
        state, metrics = setup.step(state, make_batch())
        losses.append(float(metrics["objectives"]["distill"]))
        assert metrics["loss"] == metrics["objectives"]["distill"]
    assert losses[-1] < losses[0] - 0.2
    before = setup.state.params
    changed = {path for path, x in state.params.items() if not np.array_equal(x, before[path])}
    assert changed == setup.trainable


def test_rows_of_text_give_no_gradient(setup):
    text = make_batch()
    text |= {"patch_index": jnp.full_like(text["patch_index"], -1), "image_ids": 0 * text["image_ids"]}
    config = setup.stage.config

    def loss(params):
        sums = step_lib.loss_sums(params_lib.bind(setup.model, params), text, 3, config)
        return sums["objective_loss"]["distill"], sums["objective_weight"]["distill"]

    (value, weight), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(setup.state.params)
    assert value == weight == 0
    assert all(float(jnp.abs(g).max()) == 0 for g in gradients.values())


def test_head_exists_only_where_a_stage_asks_for_it(setup):
    plain = params_lib.abstract(objectives.build(make_config(objectives={"ntp": 1.0})))
    alone = params_lib.abstract(Transformer(setup.config.model))
    assert set(plain) == set(alone) == {path for path in setup.specs if not path.startswith("objectives/")}
    assert len(setup.specs) > len(plain)


def test_data_without_teacher_features_is_told(setup):
    batch = make_batch()
    with pytest.raises(UserError, match="needs the batch field teacher_features"):
        setup.step(setup.state, {name: x for name, x in batch.items() if name != "teacher_features"})
    narrow = batch | {"teacher_features": batch["teacher_features"][..., :8]}
    with pytest.raises(UserError, match="teacher_size is 16, but the data's teacher_features have 8"):
        setup.step(setup.state, narrow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"contrst": 1.0}}, "stage.only.objectives: 'contrst' is not a kind"),
        ({"objectives": {"ntp": 0.0}}, "stage.only.objectives: needs one with a positive weight"),
        ({"objectives": {"ntp": -1.0}}, "stage.only.objectives.ntp: must be at least 0"),
    ],
)
def test_bad_objectives_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_config(**changes)


def test_preflight_knows_heads_and_features(setup):
    """What it compiles is the step that trains: on abstract arrays, of the same shapes."""
    mesh = mesh_lib.make(setup.config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = start.abstract_state(mesh, setup.specs, setup.stage, setup.trainable)
        batch = program.abstract_batch(mesh, setup.config, setup.stage)
        assert {name: x.shape for name, x in batch.items()} == {
            name: x.shape for name, x in make_batch().items()
        }
        after, metrics = jax.eval_shape(setup.step, state, batch)
    assert set(after.params) == set(setup.specs) and set(metrics["objectives"]) == {"ntp", "distill"}


def test_eve_aligned_has_the_published_sizes():
    """9.0 M + 21.0 M in front of the decoder and 43.1 M above it: 73 M train in the first stage (EVE 2.6)."""
    config = config_lib.resolve(eve_7b.get_config("aligned"))
    specs = params_lib.abstract(objectives.build(config))
    head = {path: spec for path, spec in specs.items() if path.startswith("objectives/")}
    assert params_lib.count(head) == 43_067_392
    first = params_lib.select(specs, config.stage.prealign.trainable)
    assert round(params_lib.count({path: specs[path] for path in first}) / 1e6) == 73
    assert first == {path for path in specs if path.startswith(("patch_embed/", "objectives/"))}
    assert set(objectives.build(config).objectives.distill.layers) == {*range(0, 33, 4)}
