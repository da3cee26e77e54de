"""Schedules and weight-decay groups against NEO's recorded ones; AdamW against its definition."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import FrozenConfigDict

from configs import base
from neo_jax import optim, params as params_lib
from neo_jax.convert import neo
from neo_jax.model.transformer import Transformer


def stage(steps=10, **changes):
    return FrozenConfigDict(base.stage(steps, **changes))


@pytest.fixture
def rules(golden_dir):
    return json.loads((golden_dir("neo") / "optimizer_rules.json").read_text())


def test_schedules_equal_the_recorded_ones(rules):
    assert rules["lr_schedules"]
    for recorded in rules["lr_schedules"]:
        floor = recorded["min_lr_ratio"] if recorded["type"] == "cosine_with_min_lr" else 0.0
        rate = optim.cosine(
            stage(
                recorded["total_steps"],
                warmup_steps=recorded["warmup_steps"],
                peak_lr=recorded["peak_lr"],
                min_lr_ratio=floor,
            )
        )
        for step, expected in recorded["step_lr"]:
            np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-6 * recorded["peak_lr"])


@pytest.mark.parametrize(("warmup", "floor"), [(7, 0.0), (0, 0.05)])  # their warm-up starts at the floor
def test_wsd_schedule_equals_that_of_transformers(warmup, floor):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = transformers.get_wsd_schedule(
        optimizer, warmup, 12, num_training_steps=60, decay_type="1-sqrt", min_lr_ratio=floor
    )
    config = stage(60, peak_lr=1e-3, warmup_steps=warmup, min_lr_ratio=floor, schedule="wsd")
    assert optim.cooldown_start(config) == 48
    ours = optim.SCHEDULES["wsd"](config)
    for step in range(60):
        np.testing.assert_allclose(ours(step), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-12)
        optimizer.step()
        theirs.step()


def test_linear_schedule_equals_that_of_transformers():
    """The one SOLO tunes with; it has no floor, ours may."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-5)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, 7, 50)
    ours = optim.linear(stage(50, peak_lr=1e-5, warmup_steps=7, min_lr_ratio=0.0))
    for step in range(50):
        np.testing.assert_allclose(ours(step), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-12)
        optimizer.step()
        theirs.step()
    with_floor = optim.linear(stage(50, peak_lr=1e-5, warmup_steps=7, min_lr_ratio=0.2))
    np.testing.assert_allclose(with_floor(50), 2e-6, rtol=1e-5)


def test_decay_groups_equal_neo_but_for_the_norms_it_missed(rules, golden_dir):
    """NEO's trainer decays the H/W query-key norms because a name pattern misses them; we decay no norm."""
    config = base.model()
    hf = json.loads((golden_dir("neo") / "config.json").read_text())
    config.update_from_flattened_dict(neo.model_changes(hf))
    specs = params_lib.abstract(Transformer(config))
    decays = {row.name: specs[row.paths[0]].decays for row in neo.table(config)}
    recorded = {name: True for name in rules["weight_decay"]["decayed"]}
    recorded |= {name: False for name in rules["weight_decay"]["not_decayed"]}
    assert set(decays) == set(recorded)
    differing = {name for name in decays if decays[name] != recorded[name]}
    assert differing == {name for name in recorded if re.search(r"_norm_[hw]\.weight", name)}


def test_adamw_by_hand():
    config = stage(b1=0.9, b2=0.95, adam_eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    specs = {
        "matrix": params_lib.ParamSpec((2, 2), ("embed", "mlp"), params_lib.ones, decays=True),
        "bias": params_lib.ParamSpec((2,), ("mlp",), params_lib.ones, decays=False),
    }
    optimizer = optim.adamw(config, specs, specs)
    params = {"matrix": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([1.0, 2.0])}
    grads = {"matrix": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "bias": jnp.array([0.0, 4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # The norm is 5, so gradients are cut to a fifth; the first Adam step then has size g / (|g| + eps).
    expected = np.sign([[3.0, 0.0], [0.0, 0.0]]) + 0.1 * np.asarray(params["matrix"])
    np.testing.assert_allclose(updates["matrix"], expected, atol=1e-6)
    np.testing.assert_allclose(updates["bias"], [0.0, 1.0], atol=1e-6)
