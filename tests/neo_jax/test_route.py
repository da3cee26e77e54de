"""Modality routing: the permuted form against the dense blend, its cost, its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from data_pipelines import pack, schema
from neo_jax import mesh as mesh_lib, params as params_lib, step as step_lib
from neo_jax.model import route
from neo_jax.model.transformer import Transformer
from neo_jax.preflight import search
from tests.neo_jax import rows
from tests.neo_jax.test_preflight import V5E, small_config

MODALITY = {f"route.{module}": "modality" for module in ("attention", "mlp", "norm")}


def model_and_params(**changes):
    model = Transformer(rows.tiny_model(**changes))
    specs = params_lib.abstract(model)
    return model, specs, jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(0))


def two_sided_batch(row_tokens=64, row_patches=32, num_rows=3):
    """Rows that keep both budgets of a cut in the middle; past the third they are empty."""
    rng = np.random.default_rng(0)
    grids = [((2, 3), (3, 3)), ((1, 4), (2, 4), (2, 3)), ((4, 5),)]
    documents = [
        [rows.document(rng, grid, words=(3, 5, 2, 4)), rows.document(rng, ((1, 2),), (2, 3))]
        for grid in grids
    ]
    batch = pack.stack(documents, num_rows, row_tokens, row_patches, rows.PATCH_DIM)
    visual = (batch["kinds"] == schema.PATCH).sum(axis=1)
    text = (batch["kinds"] == schema.TEXT).sum(axis=1)
    assert (visual <= row_tokens // 2).all() and (text <= row_tokens // 2).all() and visual.any()
    return batch


def test_permuted_equals_blended_values_and_gradients():
    batch = two_sided_batch()
    results = []
    for share in (0.5, 0.0):
        model, _, params = model_and_params(**MODALITY, **{"route.visual_share": share})

        def loss(params, model=model):
            hidden = params_lib.bind(model, params)(batch)
            real = jnp.asarray(batch["kinds"] > 0)[..., None]
            return jnp.sum(jnp.where(real, jnp.sin(hidden), 0.0))

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    (value, gradients), (expected, expected_gradients) = results
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, gradient in gradients.items():
        wanted = expected_gradients[path]
        bound = 1e-5 * float(jnp.abs(wanted).max())  # the two forms add up in another order
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=bound, err_msg=path)
        if "/visual/" in path:
            assert float(jnp.abs(gradient).max()) > 0, path


@pytest.fixture(scope="module")
def on_one_device():
    """Loss, its sums and gradients of a routed model, whose cut is not where a split row is cut."""
    one_stack = {"num_layers": 2, "pre_buffer": 0, "route.visual_share": 0.55}
    model, specs, params = model_and_params(**MODALITY, **one_stack)
    batch = two_sided_batch(num_rows=4)
    assert route.budgets(64, model.visual_share) == (29, 35) and not route.misrouted(batch, 0.55)

    def loss(params, batch):
        sums = step_lib.loss_sums(params_lib.bind(model, params), batch, 1)
        return sums["loss"] / sums["weight"], sums

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return compute, specs, params, batch, compute(params, batch)


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"tensor": 2, "context": 2}], ids=str)
def test_split_over_devices_equals_one_device(on_one_device, axes):
    """With `context` the permutation moves tokens from device to device."""
    compute, specs, params, batch, ((expected, sums), gradients) = on_one_device
    config = base.mesh()
    config.update(num_devices=4, **axes)
    mesh = mesh_lib.make(config)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, mesh_lib.param_shardings(mesh, specs))
        (value, split_sums), split_gradients = compute(split, mesh_lib.put_batch(mesh, batch))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(split_sums["misrouted_tokens"], 0)
    np.testing.assert_array_equal(split_sums["visual_tokens"], sums["visual_tokens"])
    for path, gradient in split_gradients.items():
        bound = 1e-5 * float(jnp.abs(gradients[path]).max())
        np.testing.assert_allclose(gradient, gradients[path], rtol=0, atol=bound, err_msg=path)
    weight = split["layers/mlp/visual/gate/weight"]
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert weight.addressable_shards[0].data.size == weight.size // parts


def test_flops_of_a_routed_layer_are_those_of_a_dense_layer():
    def flops(**changes):
        sizes = {"num_layers": 1, "pre_buffer": 0, "hidden_size": 64, "mlp_size": 256, "head_dim": 16}
        model = Transformer(rows.tiny_model(**sizes, **changes))
        specs = params_lib.abstract(model)
        shapes = {path: jax.ShapeDtypeStruct(spec.shape, np.float32) for path, spec in specs.items()}
        batch = two_sided_batch()

        def loss(params):
            return params_lib.bind(model, params)(batch).sum()

        return jax.jit(jax.grad(loss)).lower(shapes).compile().cost_analysis()["flops"]

    dense = flops()
    assert flops(**MODALITY, **{"route.visual_share": 0.5}) / dense < 1.1
    assert flops(**MODALITY) / dense > 1.4  # the blend, which runs both branches on all tokens


def test_copied_experts_change_nothing():
    """EVEv2's start: every visual copy equals its text original, so the model is the dense one."""
    batch = two_sided_batch()
    dense, _, dense_params = model_and_params()
    model, specs, _ = model_and_params(**MODALITY, **{"route.visual_share": 0.5})
    copied = {path: dense_params[path.replace("/visual", "").replace("/text", "")] for path in specs}
    expected = jax.jit(lambda params: params_lib.bind(dense, params)(batch))(dense_params)
    actual = jax.jit(lambda params: params_lib.bind(model, params)(batch))(copied)
    real = batch["kinds"] > 0
    np.testing.assert_allclose(np.asarray(actual)[real], np.asarray(expected)[real], atol=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_tokens_over_budget_are_counted(share):
    batch = two_sided_batch()
    text, visual = route.budgets(64, share)
    expected = sum(
        max(0, int((row == schema.PATCH).sum()) - visual) + max(0, int((row == schema.TEXT).sum()) - text)
        for row in batch["kinds"]
    )
    assert int(route.misrouted(batch, share)) == expected
    assert int(route.misrouted(batch, 0.5)) == 0


def test_tokens_stay_with_their_rows_on_a_tpu(tpu_compiler):
    """Devices send what a dense model's do, and the second weights of a layer: no activations."""

    def received(**changes):
        changes = {f"model.{field}": value for field, value in changes.items()}
        sizes = {"model.num_layers": 2, "model.num_kv_heads": 2, "mesh.num_devices": 4, "mesh.fsdp": 4}
        result = search.check(small_config(**sizes, **changes), "only", V5E)
        return sum(size for _, size in result.estimate.transfers.values())

    assert received(**MODALITY, **{"route.visual_share": 0.75}) < 2 * received()
