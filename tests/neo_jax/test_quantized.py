"""8-bit products: against NumPy, against full precision, and in the programs that are compiled."""

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import topologies

from configs import base
from data_pipelines import pack
from neo_jax import hardware, mesh as mesh_lib, params as params_lib, step as step_lib
from neo_jax.convert import verify
from neo_jax.errors import UserError
from neo_jax.hardware import Target
from neo_jax.model import quantized
from neo_jax.model.linear import Linear
from neo_jax.model.mlp import SwiGLU
from neo_jax.model.transformer import Transformer
from neo_jax.preflight import estimate, hlo
from neo_jax.preflight.program import Program
from tests.neo_jax import rows
from tests.neo_jax.test_preflight import small_config
from tests.neo_jax.test_step import SOURCES, Setup, initial_params

KINDS = ("int8", "fp8")


def one_stack(**changes):
    return rows.tiny_model(num_layers=2, pre_buffer=0, **changes)


# Largest error of a product of random matrices, as a share of its norm: 8 bits of 1/255, or 4 of 1/16.
ERRORS = {"int8": 0.02, "fp8": 0.08}


def rounded(x, axis, dtype):
    """x as scales times numbers of 8 bits; the numbers along `axis` share a scale."""
    largest = 127 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(largest)
    steps = (x / scale).clip(-largest, largest)
    return (np.rint(steps) if dtype == np.int8 else steps).astype(dtype).astype(np.float64) * scale


def relative(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def product_and_gradients(kind, dtype):
    """x, w, g as NumPy arrays of float32, then x @ w and its gradients for g."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(shape) for shape in ((24, 40), (40, 16), (24, 16)))
    x[3] *= 1e3  # scales are of its own row, so that this one does not drown the others
    x, w, g = (jnp.asarray(a, dtype) for a in (x, w, g))
    y, pull = jax.vjp(quantized.product(kind, "float32"), x, w)
    found = y, *pull(g)
    assert all(array.dtype == dtype for array in found)
    return tuple(np.asarray(array, np.float32) for array in (x, w, g, *found))


@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradients_are_those_of_numpy(kind):
    x, w, g, y, dx, dw = product_and_gradients(kind, "float32")
    value = np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn
    gradient = np.int8 if kind == "int8" else ml_dtypes.float8_e5m2
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    close(y, rounded(x, 1, value) @ rounded(w, 0, value))
    close(dx, rounded(g, 1, gradient) @ rounded(w, 1, value).T)
    close(dw, x.T @ g, atol=1e-2)  # of a row of thousands


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_full_precision(kind, dtype):
    x, w, g, y, dx, dw = product_and_gradients(kind, dtype)
    assert relative(y[:3], x[:3] @ w) < ERRORS[kind]
    assert relative(dx, g @ w.T) < ERRORS[kind]
    assert relative(dw, x.T @ g) < 2**-8


def test_none_is_the_plain_product():
    def plain(weight, x):
        return x @ weight.astype(x.dtype)

    def ours(weight, x):
        product = quantized.product("none", "float32")
        linear = Linear({"embed": 8}, {"mlp": 4}, params_lib.zeros, product=product)
        return params_lib.bind(linear, {"weight": weight})(x)

    def text(function):
        arrays = jnp.ones((8, 4)), jnp.ones((3, 8), jnp.bfloat16)
        return re.sub(r"module @\w+", "", jax.jit(function).lower(*arrays).as_text())

    assert text(ours) == text(plain)


def products(text):
    """Element types of all products in a StableHLO program."""
    found = re.findall(r"dot_general .*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", text)
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_which_products_have_8_bits(kind):
    """Forward and input gradient of every projection and feed-forward matrix of a layer, and nothing else.

    Their results are kept where a plain product's would be, so that none is computed twice.
    """

    def products_of(kind):
        setup = Setup(one_stack(quantization=kind, remat_policy="dots"))
        return products(jax.jit(setup.step()).lower(jax.eval_shape(setup.state), rows.batch(0)).as_text())

    plain, narrow = products_of("none"), products_of(kind)
    forward = {"int8": ("i8", "i8"), "fp8": ("f8E4M3FN", "f8E4M3FN")}[kind]
    backward = {"int8": ("i8", "i8"), "fp8": ("f8E5M2", "f8E4M3FN")}[kind]
    layer = 9  # q, k, v, q_hw, k_hw, o, gate, up, down; the layers are scanned
    wanted = [*[forward] * layer, *[backward] * layer]
    assert [pair for pair in narrow if pair != ("f32", "f32")] == sorted(wanted)
    assert len(narrow) == len(plain) == plain.count(("f32", "f32"))


ROUTED = {"route.mlp": "modality", "route.visual_share": 0.5}


@pytest.mark.parametrize(
    ("kind", "changes"), [("int8", ROUTED | {"remat_policy": "full", "dtype": "bfloat16"}), ("fp8", {})]
)
def test_trains_as_full_precision_does(kind, changes):
    """The loss after 30 steps on three batches over and over: a third of what it was, and within 3 %."""
    batches = [rows.batch(seed) for seed in range(3)] * 10
    _, full, _ = Setup(one_stack(**changes)).run(batches)
    _, narrow, metrics = Setup(one_stack(**changes, quantization=kind)).run(batches)
    assert metrics["nonfinite_steps"] == 0
    assert full[-3:].mean() < full[:3].mean() / 1.5
    np.testing.assert_allclose(narrow[:3].mean(), full[:3].mean(), rtol=0.03)
    np.testing.assert_allclose(narrow[-3:].mean(), full[-3:].mean(), rtol=0.03)


def test_sharded_equals_unsharded():
    """Largest magnitudes are found over devices too: of rows of g, and of rows and columns of weights."""
    model, batch = Transformer(one_stack(quantization="int8")), rows.batch(0)
    specs = params_lib.abstract(model)
    params = initial_params(specs)

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        sums = step_lib.loss_sums(params_lib.bind(model, params), batch, SOURCES)
        return sums["loss"] / sums["weight"]

    value, gradients = loss(params, batch)
    config = base.mesh()
    config.update(num_devices=4, fsdp=2, tensor=2)
    mesh = mesh_lib.make(config)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, mesh_lib.param_shardings(mesh, specs))
        sharded_value, sharded = loss(split, mesh_lib.put_batch(mesh, batch))
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    for path, gradient in gradients.items():
        # Sums in another order: a number halfway between two steps of 1/127 may go to the other.
        assert relative(sharded[path], gradient) < 2e-2, path


def test_cache_continues_as_the_whole_row():
    """A token has the same scales alone as in its row."""
    unbound = Transformer(one_stack(quantization="int8", mask="causal"))
    model = params_lib.bind(unbound, initial_params(params_lib.abstract(unbound)))
    document = rows.document(np.random.default_rng(0), (), (9,))
    batch = pack.stack([[document]], 1, 9, 1, rows.PATCH_DIM)
    whole = model(batch)
    prompt = batch | {name: x[:, :6] for name, x in batch.items() if x.shape[1:2] == (9,)}
    hidden, caches = model.prefill(prompt, cache_size=9)
    slots = jnp.arange(6, 9)[None]
    more, _ = model.extend(batch["tokens"][:, 6:], batch["coords"][:, 6:], slots, caches)
    assert relative(jnp.concatenate([hidden, more], axis=1), whole) < 1e-2


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"model.quantization: 'int8' needs qwix: pip install 'neo_jax\["):
        quantized.product.__wrapped__("int8", "float32")


def test_verification_of_an_export_is_in_float32():
    """An export of ours brings the switches it was trained with, what it is compared with has none."""
    batch, logits = rows.batch(0, rows=1), []
    for changes in ({}, {"quantization": "int8", "dtype": "bfloat16"}):
        model = one_stack(**changes)
        specs = params_lib.abstract(Transformer(model))
        params = initial_params(specs)
        source = types.SimpleNamespace(model=model, specs=specs, load=params.get)
        logits.append(verify.outputs(source, batch)[0])
    np.testing.assert_array_equal(*logits)


def test_on_a_tpu(tpu_compiler):
    """A feed-forward network compiled for a v5e: six of nine products are of integers, at twice the speed."""
    T, D, F = 512, 256, 512
    config = rows.tiny_model(hidden_size=D, mlp_size=F, quantization="int8")
    mlp = SwiGLU(config)
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    weights = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=here)
        for path, spec in params_lib.abstract(mlp).items()
    }

    def loss(weights, x):
        return jnp.square(params_lib.bind(mlp, weights)(x).astype(jnp.float32)).sum()

    x = jax.ShapeDtypeStruct((1, T, D), jnp.bfloat16, sharding=here)
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, x).compile().as_text()
    module = hlo.Module(text)
    assert module.flops() == 9 * 2 * T * D * F
    assert module.flops(("s8",)) == 6 * 2 * T * D * F

    target = Target(hardware.parse("v5e:2x2"))
    found = estimate.estimate(
        small_config(),
        "only",
        target,
        Program(text, memory={}, cost_flops=0.0, lower_s=0.0, compile_s=0.0, host_bytes=0),
        estimate.Rows(tokens=1024, image_tokens=64, documents=8),
    )
    chip = target.slice.chip
    wanted = 2 * T * D * F * (3 / chip.peak_bf16 + 6 / chip.peak_int8)
    np.testing.assert_allclose(found.seconds["compute"], wanted)
