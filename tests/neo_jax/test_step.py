"""Truths of a step: packing, accumulation and sharding change nothing; stages train what they name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs import base
from data_pipelines import pack
from neo_jax import mesh as mesh_lib, params as params_lib, step as step_lib
from neo_jax.model.transformer import Transformer
from neo_jax.stages import Stage
from tests.neo_jax import rows

SOURCES = 3


def initial_params(specs, seed=0):
    return jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(seed))


class Setup:
    """A tiny model and a jitted step of one stage."""

    def __init__(self, model=None, **stage):
        self.model = Transformer(model or rows.tiny_model())
        self.specs = params_lib.abstract(self.model)
        config = FrozenConfigDict(base.stage(10, **{"warmup_steps": 2, "peak_lr": 1e-2} | stage))
        self.stage = Stage("only", 0, 0, 10, config)
        self.trainable = params_lib.select(self.specs, config.trainable)

    def state(self):
        params = initial_params(self.specs)
        return step_lib.initial_state(params, self.specs, self.stage, self.trainable)

    def step(self):
        return step_lib.make_train_step(self.model, self.specs, self.stage, self.trainable, SOURCES)

    def run(self, batches):
        state, step, losses = self.state(), jax.jit(self.step()), []
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        return state, np.array(losses), metrics


BATCHES = [rows.batch(seed, rows=4) for seed in range(3)]


@pytest.fixture(scope="module")
def straight():
    """State, losses and last metrics after BATCHES, on one device and each taken at once."""
    return Setup().run(BATCHES)


def assert_close(tree, other, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), tree, other)


def test_packed_equals_unpacked():
    documents = rows.documents(np.random.default_rng(3), 7)
    packed = pack.pack_rows(documents, pack.row_budgets(40, 16))
    assert len(packed) < len(documents)
    setup = Setup()
    params = initial_params(setup.specs)

    def loss(params, batch):
        sums = step_lib.loss_sums(params_lib.bind(setup.model, params), batch, SOURCES)
        return sums["loss"] / sums["weight"], sums

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def gradients(laid_out):
        (value, sums), grads = value_and_grad(params, pack.stack(laid_out, 8, 40, 16, rows.PATCH_DIM))
        return value, sums, grads

    value, sums, grads = gradients(packed)
    alone_value, alone_sums, alone_grads = gradients([[document] for document in documents])
    np.testing.assert_allclose(value, alone_value, rtol=1e-5)
    assert_close(grads, alone_grads)
    assert_close(sums, alone_sums, atol=1e-3)
    assert sums["documents"] == len(documents)
    assert sums["attended_pairs"] == alone_sums["attended_pairs"]


def test_accumulated_equals_one_batch(straight):
    state, losses, metrics = straight
    for parts in (2, 4):
        parted, parted_losses, parted_metrics = Setup(accumulate=parts, batch_size=4).run(BATCHES)
        np.testing.assert_allclose(parted_losses, losses, rtol=1e-5)
        assert_close(parted.params, state.params)
        assert_close(parted_metrics["source_loss"], metrics["source_loss"], atol=1e-3)


@pytest.mark.parametrize(
    ("axes", "parts"),
    [
        ({"data": 4}, 1),
        ({"fsdp": 4}, 1),
        ({"fsdp": 2, "tensor": 2}, 1),
        ({"fsdp": 2, "tensor": 2}, 2),
        ({"data": 2, "context": 2}, 1),
        ({"fsdp": 2, "context": 2}, 2),
        ({"tensor": 2, "context": 2}, 1),
        ({"tensor": 2}, 1),  # no axis but this one: no device has positions of its own
    ],
)
def test_sharded_equals_unsharded(straight, axes, parts):
    """Also where each device accumulates; test_aot.py looks at what it holds meanwhile."""
    setup, (expected, losses, _) = Setup(accumulate=parts, batch_size=4), straight
    config = base.mesh()
    config.update(num_devices=math.prod(axes.values()), **axes)
    mesh = mesh_lib.make(config, jax.devices()[: config.num_devices])
    with jax.set_mesh(mesh):
        shardings = mesh_lib.state_shardings(mesh, setup.specs, jax.eval_shape(setup.state))
        state = jax.jit(setup.state, out_shardings=shardings)()
        step = jax.jit(setup.step(), donate_argnums=0)
        for batch, loss in zip(BATCHES, losses, strict=True):
            state, metrics = step(state, mesh_lib.put_batch(mesh, batch))
            np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(state.params, expected.params)
    if "fsdp" in axes:
        weight = state.params["layers/mlp/gate/weight"]
        assert weight.addressable_shards[0].data.size < weight.size


@pytest.mark.parametrize(
    "patterns",
    [("patch_embed/.*", "pre_buffer/.*"), (r"layers/attention/qkv/[qk]_(hw|norm_[hw])/weight",), (".*",)],
)
def test_stage_trains_exactly_what_it_names(patterns):
    setup = Setup(trainable=patterns, weight_decay=0.1)
    before = jax.device_get(setup.state().params)
    state, _, _ = setup.run([rows.batch(seed) for seed in range(3)])
    changed = {path for path, x in state.params.items() if not np.array_equal(x, before[path])}
    assert changed == setup.trainable
    moments = {
        key.key
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
        for key in path
        if isinstance(key, jax.tree_util.DictKey)
    }
    assert moments == setup.trainable


def test_step_without_finite_loss_changes_nothing_and_is_counted():
    setup = Setup()
    step = jax.jit(setup.step())
    state, _ = step(setup.state(), rows.batch(0))
    poisoned = rows.batch(1)
    poisoned["loss_weights"][0, 1] = np.nan
    after, metrics = step(state, poisoned)
    assert metrics["nonfinite_steps"] == after.nonfinite_steps == 1
    assert after.step == 2
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    recovered, metrics = step(after, rows.batch(2))
    assert np.isfinite(metrics["loss"]) and recovered.nonfinite_steps == 1


def test_remat_and_depth_of_stacks_do_not_change_values():
    batch = rows.batch(0)
    setup = Setup()
    params = initial_params(setup.specs, seed=1)

    def loss(model, params):
        return step_lib.loss_sums(params_lib.bind(model, params), batch, SOURCES)["loss"]

    expected = jax.jit(jax.value_and_grad(lambda p: loss(setup.model, p)))(params)
    for policy in ("full", "offload"):  # a CPU has one memory; test_aot.py looks for what a TPU offloads
        remat = Transformer(rows.tiny_model(remat_policy=policy))
        found = jax.jit(jax.value_and_grad(lambda p, remat=remat: loss(remat, p)))(params)
        assert_close(found, expected, atol=1e-4)

    # The same layers without a pre-buffer: one stack of three.
    one_stack = Transformer(rows.tiny_model(pre_buffer=0))
    joined = {path: x for path, x in params.items() if not path.startswith(("layers/", "pre_buffer/"))}
    for path, x in params.items():
        if path.startswith("layers/"):
            pre = params[path.replace("layers/", "pre_buffer/")]
            joined[path] = jnp.concatenate([pre, x])
    value = jax.jit(lambda p: loss(one_stack, p))(joined)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)


def test_bfloat16_is_close_to_float32():
    batch = rows.batch(0)
    setup, half = Setup(), Transformer(rows.tiny_model(dtype="bfloat16"))
    params = initial_params(setup.specs)
    full, low = (
        jax.jit(lambda p, model=model: params_lib.bind(model, p)(batch))(params)
        for model in (setup.model, half)
    )
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), full, atol=0.15)


def test_zero_hw_keys_leave_text_as_1d():
    """NEO section 7: with k_hw = 0 the H/W channels add nothing, whatever q_hw is."""
    batch = rows.batch(0)
    wide, plain = Transformer(rows.tiny_model()), Transformer(rows.tiny_model(**{"coords.kind": "1d"}))
    params = initial_params(params_lib.abstract(wide))
    params = {path: jnp.zeros_like(x) if path.endswith("/k_hw/weight") else x for path, x in params.items()}
    narrow = {path: params[path] for path in params_lib.abstract(plain)}
    wide_out = jax.jit(lambda p: params_lib.bind(wide, p)(batch))(params)
    plain_out = jax.jit(lambda p: params_lib.bind(plain, p)(batch))(narrow)
    np.testing.assert_allclose(wide_out, plain_out, atol=1e-5)
