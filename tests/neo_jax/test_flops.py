"""Counted FLOPs against a count by hand and against XLA's cost analysis."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from neo_jax import flops, params as params_lib, step as step_lib
from neo_jax.model.transformer import Transformer
from tests.neo_jax import rows


def test_hand_count():
    config = rows.tiny_model(num_layers=1, pre_buffer=0, num_kv_heads=2)
    specs = params_lib.abstract(Transformer(config))
    counts = {"tokens": 10, "visual_tokens": 4, "patches": 4, "supervised_tokens": 3, "attended_pairs": 55}
    D, N, K, d, F, V, C = 32, 4, 2, 8, 48, 64, 8
    layer = D * (2 * N * d + 2 * K * d + K * d) + N * d * D + 3 * D * F
    forward = 10 * layer + 3 * D * V + 4 * (4 * 12 * C + 4 * C * D)
    attention = 55 * N * (2 * d + d)  # queries and keys have 2 d channels, values d
    everything = frozenset(specs)
    assert flops.train_flops(config, specs, everything, counts) == 6 * (forward + attention)
    # Frozen weights save their own gradient: 4 instead of 6 operations per weight and token.
    frozen = flops.train_flops(config, specs, everything - {"head"}, counts)
    assert frozen == 6 * (forward + attention) - 2 * 3 * D * V
    # A tied head is the token table, and trains with it.
    config = rows.tiny_model(num_layers=1, pre_buffer=0, num_kv_heads=2, tie_embeddings=True)
    assert "head" not in params_lib.abstract(Transformer(config))
    specs.pop("head")
    for trainable in everything, everything - {"token_embed"}:
        tied = flops.train_flops(config, specs, trainable, counts)
        assert tied == 6 * (forward + attention) - 2 * 3 * D * V * ("token_embed" not in trainable)


def test_against_xla(monkeypatch):
    """One layer (XLA counts a scanned body once), full rows, every token supervised."""
    sizes = dict(num_layers=1, pre_buffer=0, hidden_size=64, mlp_size=256, head_dim=16)
    config = rows.tiny_model(**sizes, attention="reference")
    model = Transformer(config)
    specs = params_lib.abstract(model)
    B, L, P = 2, 64, 8
    batch = rows.batch(rows=B, row_tokens=L, row_patches=P)
    batch["loss_weights"] = np.ones((B, L), np.float32)

    def loss(params):
        return step_lib.loss_sums(params_lib.bind(model, params), batch, 3)["loss"]

    params = {path: jax.ShapeDtypeStruct(spec.shape, np.float32) for path, spec in specs.items()}
    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]
    # XLA computes padded positions and masked pairs too; count those in for the comparison.
    sums = {"tokens": B * L, "patches": B * P, "supervised_tokens": B * L, "attended_pairs": B * L * L}
    sums["visual_tokens"] = 0
    ours = flops.train_flops(config, specs, frozenset(specs), sums)
    assert counted == pytest.approx(
        ours, rel=0.25
    )  # XLA adds norms, softmax, rotations and the optimizer's share
    assert counted > ours


@pytest.mark.parametrize(
    ("kind", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v6 lite", 918e12), ("TPU7x", 2307e12 / 2)]
)
def test_peak_of_a_known_chip_is_the_published_one(monkeypatch, kind, peak):
    """Per device: a TPU7x chip has two."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert flops.peak("bfloat16") == peak
