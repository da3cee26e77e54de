"""Learned experts: against a loop over all experts, against transformers, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.experimental import topologies
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeSparseMoeBlock,
    load_balancing_loss_func,
)

from configs import base
from data_pipelines import pack, schema
from neo_jax import (
    config as config_lib,
    decode,
    flops,
    mesh as mesh_lib,
    params as params_lib,
    step as step_lib,
    steplog,
)
from neo_jax.convert.families import FAMILIES
from neo_jax.errors import UserError
from neo_jax.kernels.grouped import tiled
from neo_jax.model.coords import rotary
from neo_jax.model.experts import Experts, Load
from neo_jax.model.route import routing
from neo_jax.model.transformer import Transformer
from neo_jax.objectives.balance import balance
from neo_jax.objectives.ntp import dense_cross_entropy
from neo_jax.preflight import hlo
from tests.neo_jax import rows
from tests.neo_jax.test_step import SOURCES, Setup, assert_close, initial_params

NUM, B, L, D, F = 8, 2, 15, 32, 48


def topk_model(per_token=1, **changes):
    return rows.tiny_model(**{"route.mlp": "topk", "experts.per_token": per_token} | changes)


# Products of groups


@pytest.mark.parametrize("sizes", [(3, 0, 10, 8), (0, 24, 0, 0)], ids=str)
def test_tiles_are_ragged_dot(sizes):
    rng = np.random.default_rng(0)
    shapes = (sum(sizes), 5), (len(sizes), 5, 6), (sum(sizes), 6)
    x, w, c = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def value_and_gradients(product):
        def loss(x, w):
            y = product(x, w, jnp.array(sizes, jnp.int32))
            return (jnp.sin(y) * c).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)

    found = value_and_gradients(lambda *arrays: tiled(*arrays, block=8))
    assert_close(found, value_and_gradients(jax.lax.ragged_dot), atol=1e-5)


# One layer


def layer(per_token, mlp="swiglu", seed=0):
    """A layer, its parameters, inputs, what its gradient is taken for, and a row whose end is padding."""
    unbound = Experts(topk_model(per_token, mlp=mlp))
    params = params_lib.init(params_lib.abstract(unbound), jax.random.key(seed))
    params["router/weight"] *= 10  # as sure of itself as a trained one
    x, c = (jax.random.normal(jax.random.key(seed + i), (B, L, D)) for i in (1, 2))
    kinds = jnp.full((B, L), schema.TEXT).at[1, 10:].set(schema.PAD)
    return unbound, params, x, c, routing(kinds, 0.0)


def value_and_gradients(unbound, params, x, c, routed):
    def loss(params, x):
        y, load = params_lib.bind(unbound, params)(x, routed)
        return (y * c).sum(), (y, load)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return *outputs, gradients


@pytest.mark.parametrize(("per_token", "mlp"), [(1, "swiglu"), (3, "relu2")])
def test_layer_is_a_loop_over_experts(per_token, mlp):
    """Every expert on every token, masks in place of sorting."""
    unbound, params, x, c, routed = layer(per_token, mlp)
    y, load, gradients = value_and_gradients(unbound, params, x, c, routed)

    def by_masks(params, x):
        probability = jax.nn.softmax(x @ params["router/weight"])
        least = jnp.sort(probability)[..., -per_token][..., None]
        weight = jnp.where(probability >= least, probability, 0.0)
        weight = weight / weight.sum(-1, keepdims=True) if per_token > 1 else weight
        total = jnp.zeros_like(x)
        for e in range(NUM):
            mats = {name.split("/")[1]: w[e] for name, w in params.items() if name.startswith("experts/")}
            up = x @ mats["up"]
            inner = jax.nn.silu(x @ mats["gate"]) * up if mlp == "swiglu" else jnp.maximum(up, 0) ** 2
            total += weight[..., e, None] * (inner @ mats["down"])
        return (total * c).sum(), (total, weight > 0, probability)

    wanted = jax.jit(jax.value_and_grad(by_masks, argnums=(0, 1), has_aux=True))(params, x)
    (_, (total, taken, probability)), wanted_gradients = wanted
    assert params["experts/down/weight"].shape == (NUM, F // per_token, D)
    assert_close((y, gradients), (total, wanted_gradients), atol=1e-4)
    assert all(float(jnp.abs(gradient).max()) > 0 for gradient in gradients[0].values())
    real = routed.real[..., None]
    np.testing.assert_array_equal(load.tokens, (taken & real).sum((0, 1)))
    assert load.tokens.sum() == per_token * (2 * L - 5)
    np.testing.assert_allclose(load.probability, (probability * real).sum((0, 1)), rtol=1e-5)
    # Of one layer, with padding; theirs is k times as large.
    logits = torch.tensor(np.asarray(x @ params["router/weight"])).reshape(B * L, NUM)
    theirs = load_balancing_loss_func((logits,), NUM, per_token, torch.tensor(np.asarray(routed.real)))
    ours = balance(jax.tree.map(lambda x: x[None], load)) / routed.real.sum()
    np.testing.assert_allclose(ours, theirs / per_token, rtol=1e-5)


def test_layer_is_that_of_qwen3_moe():
    unbound, params, x, c, routed = layer(per_token=2)
    y, _, (gradients, dx) = value_and_gradients(unbound, params, x, c, routed)
    hf = Qwen3MoeConfig(
        hidden_size=D,
        num_experts=NUM,
        num_experts_per_tok=2,
        moe_intermediate_size=F // 2,
        norm_topk_prob=True,
    )
    block = Qwen3MoeSparseMoeBlock(hf)

    def theirs(params):
        """Ours under their names."""
        params = {path: torch.tensor(np.asarray(value)) for path, value in params.items()}
        both = [params[f"experts/{name}/weight"].mT for name in ("gate", "up")]
        down = params["experts/down/weight"].mT
        return params["router/weight"].T, torch.cat(both, dim=1), down

    weights = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj
    with torch.no_grad():
        for weight, value in zip(weights, theirs(params), strict=True):
            weight.copy_(value)
    inputs = torch.tensor(np.asarray(x), requires_grad=True)
    out = block(inputs)
    (out * torch.tensor(np.asarray(c))).sum().backward()
    assert_close((y, dx), (out.detach().numpy(), inputs.grad.numpy()))
    for weight, gradient in zip(weights, theirs(gradients), strict=True):
        np.testing.assert_allclose(gradient, weight.grad, atol=1e-4)


# Balance


def test_balance_is_one_if_even_and_the_number_of_experts_if_one_takes_all():
    tokens = 40.0
    even, one = jnp.full(NUM, tokens / NUM), jnp.zeros(NUM).at[3].set(tokens)
    both = Load(jnp.stack([even, one]), jnp.stack([even, one]))
    np.testing.assert_allclose(balance(both) / tokens, (1 + NUM) / 2)
    np.testing.assert_allclose(balance(Load(even[None], even[None])) / tokens, 1)


# The model

BATCH = rows.batch(0, rows=8)


class Routed(Setup):
    """A tiny model with learned experts, of which a token takes one, in scanned and recomputed layers."""

    def __init__(self, **stage):
        model = topk_model(num_layers=2, pre_buffer=0, remat_policy="dots")
        super().__init__(model, objectives={"ntp": 1.0, "balance": 0.1}, **stage)

    def loss(self, params, batch):
        sums = step_lib.loss_sums(params_lib.bind(self.model, params), batch, SOURCES, self.stage.config)
        losses = {name: x / sums["objective_weight"][name] for name, x in sums["objective_loss"].items()}
        return losses["ntp"] + 0.1 * losses["balance"], (losses, sums)


@pytest.fixture(scope="module")
def setup():
    setup = Routed()
    setup.params = initial_params(setup.specs)
    setup.evaluate = jax.jit(jax.value_and_grad(setup.loss, has_aux=True))
    return setup


@pytest.fixture(scope="module")
def whole(setup):
    """Loss and gradients of BATCH: ((loss, (objectives, sums)), gradients)."""
    return setup.evaluate(setup.params, BATCH)


def test_packing_and_padding_change_nothing(setup):
    """Not the balance either, nor what stands in padding."""
    documents = rows.documents(np.random.default_rng(3), 7)
    packed = pack.pack_rows(documents, pack.row_budgets(40, 16))
    alone = [[document] for document in documents]
    assert len(packed) < len(alone)
    batches = [pack.stack(laid_out, 8, 40, 16, rows.PATCH_DIM) for laid_out in (packed, alone)]
    scribbled = {name: np.array(x) for name, x in batches[0].items()}
    padding = scribbled["kinds"] == schema.PAD
    scribbled["tokens"][padding] = np.random.default_rng(4).integers(6, 64, padding.sum())
    first, *others = [setup.evaluate(setup.params, batch) for batch in [*batches, scribbled]]
    (_, (losses, sums)), _ = first
    assert losses["balance"] > 1.02
    np.testing.assert_array_equal(sums["expert_tokens"].sum(axis=-1), [sums["tokens"]] * 2)  # of two layers
    for other in others:
        assert_close(other, first, atol=1e-3)
        assert_close(other[1], first[1])


def make_mesh(**axes):
    config = base.mesh()
    config.update(num_devices=4, **axes)
    return mesh_lib.make(config)


def test_sharded_equals_unsharded(setup, whole):
    """Each device sorts its own tokens, and has a part of every expert; the balance is that of all tokens."""
    mesh = make_mesh(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        split = jax.device_put(setup.params, mesh_lib.param_shardings(mesh, setup.specs))
        found = jax.jit(jax.value_and_grad(setup.loss, has_aux=True))(split, mesh_lib.put_batch(mesh, BATCH))
    assert_close(found, whole, atol=1e-3)
    assert_close(found[1], whole[1])
    np.testing.assert_array_equal(found[0][1][1]["expert_tokens"], whole[0][1][1]["expert_tokens"])
    weight = split["layers/mlp/experts/gate/weight"]
    assert weight.sharding.shard_shape(weight.shape) == (2, NUM, D // 2, F // 2)


def test_layer_with_split_rows_equals_the_whole_layer():
    unbound, params, x, c, _ = layer(per_token=2)
    x, c = x[:, :14], c[:, :14]
    routed = routing(jnp.full((B, 14), schema.TEXT), 0.0)
    expected = value_and_gradients(unbound, params, x, c, routed)
    mesh = make_mesh(data=2, context=2)
    with jax.set_mesh(mesh):
        split = (jax.device_put(array, mesh_lib.batch_sharding(mesh)) for array in (x, c))
        found = value_and_gradients(unbound, params, *split, routed)
    assert_close(found, expected)


def without_rows(batch, part):
    """The batch with only every second row, from `part` on; the others are padding."""
    kept = {name: np.array(x) for name, x in batch.items()}
    for name, x in kept.items():
        x[1 - part :: 2] = -1 if name == "patch_index" else 0
    return kept


def test_training_balances_every_part_by_itself_and_learns(setup, whole):
    """Accumulated, the loss of words is that of one batch, and balance is the mean of the parts'."""
    parted = Routed(accumulate=2, batch_size=8)
    step, state, lines = jax.jit(parted.step()), parted.state(), []
    for _ in range(30):
        state, metrics = step(state, BATCH)
        lines.append(metrics)
    losses, ntp, balances = np.array(
        [[line["loss"], line["objectives"]["ntp"], line["objectives"]["balance"]] for line in lines]
    ).T
    np.testing.assert_allclose(losses, ntp + 0.1 * balances, rtol=1e-5)
    assert ntp[-1] < 0.6 * ntp[0]
    assert balances[-5:].max() < 1.15 and metrics["nonfinite_steps"] == 0

    (_, (objectives, sums)), _ = whole
    parts = [setup.evaluate(setup.params, without_rows(BATCH, part))[0][1] for part in (0, 1)]
    tokens = np.array([float(part["tokens"]) for _, part in parts])
    of_parts = np.array([float(losses["balance"]) for losses, _ in parts])
    np.testing.assert_allclose(ntp[0], objectives["ntp"], rtol=1e-5)
    np.testing.assert_allclose(balances[0], of_parts @ tokens / tokens.sum(), rtol=1e-5)
    np.testing.assert_array_equal(lines[0]["expert_tokens"], sums["expert_tokens"])
    # The difference that objectives/balance.py states: E times the covariance of f and P between parts.
    assert 0 < balances[0] - objectives["balance"] < 0.1


def test_scanned_and_recomputed_is_unrolled(setup, whole):
    """Values, gradients and the balance, which is the layers' mean."""

    @jax.jit
    @jax.value_and_grad
    def unrolled(params, batch):
        model, loads = params_lib.bind(setup.model, params), []
        x, table = model.embed(batch), rotary(model.rotary_parts, batch["coords"])
        graph, weights = nnx.split(model.layers)
        for layer in range(2):
            block = nnx.merge(graph, jax.tree.map(lambda p, layer=layer: p[layer], weights))
            x, _, load = block(x, table, model.intervals(batch), routing(batch["kinds"], 0.0))
            loads.append(balance(jax.tree.map(lambda x: x[None], load)))
        args = model.norm(x), model.head_DV(), batch["targets"], batch["loss_weights"]
        ntp = dense_cross_entropy(*args)[0] / batch["loss_weights"].sum()
        return ntp + 0.1 * sum(loads) / 2 / (batch["kinds"] > 0).sum()

    value, gradients = unrolled(setup.params, BATCH)
    np.testing.assert_allclose(value, whole[0][0], rtol=1e-5)
    assert_close(gradients, whole[1])


def test_reading_a_prompt_and_going_on_is_the_full_forward(setup):
    model, tail = params_lib.bind(setup.model, setup.params), 4
    document = rows.document(np.random.default_rng(0), ((2, 3),), (3, 2 + tail))
    batch = pack.stack([[document]], 1, len(document.tokens), 6, rows.PATCH_DIM)
    length = len(document.tokens) - tail
    prompt = {name: x[:, :length] if x.shape[1] == len(document.tokens) else x for name, x in batch.items()}

    @jax.jit
    def scores(prompt, tails):
        prefix = decode.read_prompts(model, prompt)
        return prefix.logits, decode.score_candidates(model, prefix, tails, jnp.array([tail]))

    logits, score = scores(prompt, document.tokens[None, -tail:])
    whole = jax.jit(lambda batch: model.logits(model(batch)))(batch)[0, length - 1 : -1]
    np.testing.assert_allclose(logits[0], whole[0], atol=2e-5)
    expected = jax.nn.log_softmax(whole)[np.arange(tail), document.tokens[-tail:]].sum()
    np.testing.assert_allclose(score[0, 0], expected, atol=2e-5)


# Counts


def test_log_tells_the_share_of_the_busiest_expert():
    found = steplog.busiest_experts({"expert_tokens": np.array([[6.0, 2.0], [3.0, 5.0]])})
    assert found == {"busiest_expert_share": (6 / 8 + 5 / 8) / 2, "busiest_expert_share_max": 6 / 8}
    assert steplog.busiest_experts({}) == {}


def test_flops_are_of_the_experts_that_a_token_takes():
    counts = {"tokens": 10, "visual_tokens": 4, "patches": 4, "supervised_tokens": 3, "attended_pairs": 55}

    def counted(config):
        specs = params_lib.abstract(Transformer(config))
        return flops.train_flops(config, specs, frozenset(specs), counts)

    dense, router = counted(rows.tiny_model()), 6 * 10 * D * NUM
    for per_token in (1, 2):
        assert counted(topk_model(per_token)) == dense + 3 * router  # of three layers


def test_flops_on_a_tpu(tpu_compiler):
    """Those of a dense layer of the width that a token uses, and of the router; not E times as many."""
    T, D, F, k = 1024, 256, 512, 2
    config = topk_model(k, hidden_size=D, mlp_size=F)
    unbound = Experts(config)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1]
    mesh = mesh_lib.make(base.mesh(), devices)

    def loss(params, x):
        y, _ = params_lib.bind(unbound, params)(x, None)
        return jnp.square(y.astype(jnp.float32)).sum()

    with jax.set_mesh(mesh):
        specs = params_lib.abstract(unbound)
        splits = mesh_lib.param_shardings(mesh, specs)
        params = {
            path: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=splits[path])
            for path, spec in specs.items()
        }
        x = jax.ShapeDtypeStruct((1, T, D), jnp.bfloat16, sharding=mesh_lib.batch_sharding(mesh))
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().as_text()
    dense, router = 3 * 3 * 2 * T * D * F, 3 * 2 * T * D * NUM
    # Products in float32 are three or six of bfloat16: of the router, which is small.
    assert dense < hlo.Module(text).flops() < 1.02 * dense + 6 * router


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"experts.per_token": "8"}, "model.experts.per_token: 8 of model.experts.num = 8 leaves nothing"),
        ({"experts.per_token": "5"}, "model.mlp_size: 768 is not divisible by model.experts.per_token = 5"),
        ({"experts.num": "0"}, "model.experts.num: must be positive"),
        ({"quantization": "int8"}, "model.quantization: 'int8' is not supported by model.route.mlp 'topk'"),
        ({"mlp_bias": "true"}, "model.mlp_bias: True is not supported by model.route.mlp 'topk'"),
        ({"route.mlp": "shared"}, "stage.only.objectives.balance: there is nothing to balance unless"),
        ({"route.attention": "topk"}, "model.route.attention: 'topk' is not a kind"),
    ],
)
def test_what_experts_cannot_be_is_told(overrides, message):
    config = base.get_config()
    config.stages, config.stage.only = ("only",), base.stage(10, warmup_steps=0, objectives={"balance": 0.01})
    config.model.route.mlp = "topk"
    config_lib.resolve(config)
    with pytest.raises(UserError) as caught:
        config_lib.resolve(config, [(f"model.{name}", text) for name, text in overrides.items()])
    assert message in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_exports_experts(family):
    with pytest.raises(UserError, match=r"model.route.mlp: 'topk' has no place in Hugging Face's layout"):
        list(FAMILIES[family].table(topk_model()))
