"""Every benchmark runs, at toy size, and computes what it says. None asserts a speed."""

import re

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from benchmarks import (
    attention,
    checkpoint_stall,
    cross_entropy,
    experts,
    first_step,
    rows,
    scale,
    torch_neo,
    train_step,
    turns,
)
from configs import base
from neo_jax import config as config_lib


@pytest.fixture(scope="module")
def toy() -> FrozenConfigDict:
    c = base.get_config()
    m = c.model
    c.data.vocab_size = m.vocab_size = 64
    m.hidden_size, m.mlp_size = 32, 48
    m.num_layers, m.pre_buffer = 3, 1
    m.num_heads, m.num_kv_heads, m.head_dim = 4, 2, 8
    m.init_std = 0.1
    m.embed.patch_size, m.embed.merge_size, m.embed.hidden_size = 2, 2, 8
    c.stages = ("full",)
    shape = dict(batch_size=2, row_tokens=96, row_patches=64, min_pixels=16**2, max_pixels=16**2)
    c.stage.full = base.stage(10, warmup_steps=0, min_lr_ratio=1.0, **shape)
    return config_lib.resolve(c)


def test_rows_are_full_captions(toy):
    batch = rows.batch(toy.model, 2, 96, 64)
    assert (batch["kinds"] > 0).mean() > 0.9
    assert (batch["patch_index"].max(axis=1) < 64).all()
    assert ((batch["loss_weights"] > 0) <= (batch["kinds"] == 1)).all()
    # Where a word is predicted, the next position holds it.
    at = np.argwhere(batch["loss_weights"] > 0)
    assert all(batch["targets"][b, i] == batch["tokens"][b, i + 1] for b, i in at)


def test_turns_take_the_median_after_a_warm_up():
    calls: list[str] = []
    spent = turns.take({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert all(time >= 0 for times in spent.values() for time in times)


def test_torch_trains_the_same_model(toy, monkeypatch):
    result = train_step.measure(toy, repeats=3, compiled=False)
    assert result["ratio_vs_torch_eager"] > 0 and result["tokens_per_s"] > 0

    def another(model: torch_neo.Neo, params: dict) -> None:
        load(model, params | {"norm/weight": params["norm/weight"] * 1.01})

    load = torch_neo.load
    monkeypatch.setattr(torch_neo, "load", another)
    batch = train_step.batch_of(toy)
    losses = {name: [train_step.contender(name, toy, batch)()] for name in ("ours", "eager")}
    with pytest.raises(ValueError, match="losses differ"):
        train_step.check_losses(losses)


def test_sizes_are_what_their_names_say():
    for name in train_step.SIZES:
        count = train_step.count(train_step.config_of(name))
        assert count / 1e6 == pytest.approx(int(name.removesuffix("M")), rel=0.15)


def test_attention():
    measured = attention.measure(64, 32)
    assert measured["ratio"] > 0
    assert measured["attended"] == pytest.approx(0.5)  # two documents, all image: each sees itself whole


def test_cross_entropy():
    small, large = (cross_entropy.measure(256, vocabulary, repeats=1) for vocabulary in (64, 128))
    assert small["ratio"] > 0
    # The full logits are [256, V].
    assert large["dense_temporary_bytes"] - small["dense_temporary_bytes"] >= 256 * 64 * 4


def test_experts():
    measured = experts.measure(64, repeats=1)
    assert measured["tiles_ratio"] > 0 and measured["ragged_dot_ratio"] > 0 and measured["busiest"] > 64 / 8


def test_scale():
    size = dict(layers=2, width=64, length=128, tokens=128)
    table = scale.axis({str(num): scale.config_of(experts=num, **size) for num in (1, 4)}, repeats=1)
    assert table["1"]["seconds"] > 0 and table["4"]["seconds"] > 0
    tokens = (scale.batch_of(scale.config_of(**size))["kinds"] > 0).sum()
    router = 6 * tokens * 2 * 64 * 4  # layers, width, experts
    assert table["4"]["flops"] == table["1"]["flops"] + router
    layers = scale.layers(repeats=1, **size)
    assert layers["modality"]["seconds"] > 0
    assert 0.95 < layers["modality"]["flops"] / layers["shared"]["flops"] < 1.1  # norms and their blending


def test_checkpoint_stall(toy):
    measured = checkpoint_stall.measure(toy, repeats=1)
    assert set(measured) == {"alone", "stall", "beside"} and all(x > 0 for x in measured.values())


@pytest.mark.slow
def test_first_step(quickstart_data, capfd):
    flags = (f"--config.data.path={quickstart_data.data.path}",)
    measured = first_step.measure("configs/quickstart.py:tiny", repeats=1, flags=flags)
    assert measured["cold"] > 0 and measured["warm"] > 0
    with pytest.raises(RuntimeError, match=re.escape("ended before its first step")):
        first_step.measure("configs/no_such.py", repeats=1)
