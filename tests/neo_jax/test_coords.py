"""Rotary positions against transformers, and against NumPy where it has none of the kind."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PersimmonConfig, Qwen2VLTextConfig
from transformers.models.persimmon.modeling_persimmon import (
    PersimmonRotaryEmbedding,
    apply_rotary_pos_emb as persimmon_rotate,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    apply_rotary_pos_emb as qwen_rotate,
)

from neo_jax import params as params_lib
from neo_jax.model.attention import Attention
from neo_jax.model.coords import COORDS, rotary, rotate, t_behind, text_coords
from neo_jax.model.mask import Intervals
from tests.neo_jax import rows

B, L, N, D = 2, 11, 3, 16
DTYPES = {"float32": 1e-5, "bfloat16": 1e-2}  # half a unit in the last place of bfloat16 is 2^-9 of a value


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(B, L, N, D)).astype(np.float32),
        rng.integers(0, 500, (B, L, 3)).astype(np.float32),
    )


def ours(config, x, coords, dtype):
    parts = COORDS[config.kind](config, D).parts
    turned = rotate(jnp.asarray(x, dtype), rotary(parts, jnp.asarray(coords)), parts)
    assert turned.dtype == dtype
    return np.asarray(turned.astype(jnp.float32))


def coords_config(**changes):
    return rows.tiny_model(**{f"coords.{name}": value for name, value in changes.items()}).coords


@pytest.mark.parametrize("dtype", DTYPES)
def test_mrope_is_qwen2_vl(dtype):
    x, coords = inputs()
    sections, theta = (2, 3, 3), 5e4
    hf = Qwen2VLTextConfig(
        hidden_size=N * D,
        num_attention_heads=N,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)},
    )
    xt = torch.from_numpy(x).to(getattr(torch, dtype)).transpose(1, 2)
    cos, sin = Qwen2VLRotaryEmbedding(hf)(xt, torch.from_numpy(coords).permute(2, 0, 1))
    expected = qwen_rotate(xt, xt, cos, sin)[0].transpose(1, 2).float().numpy()
    found = ours(coords_config(kind="mrope", rope_theta=theta, sections=sections), x, coords, dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=DTYPES[dtype] * np.abs(x).max())


@pytest.mark.parametrize("kind", ["1d", "v2pe"])
@pytest.mark.parametrize("fraction", [0.5, 0.25, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_fraction_is_persimmons(kind, fraction, dtype):
    """The first channels turn, the others stay; v2pe turns by fractions too."""
    x, coords = inputs()
    coords = coords / 4 if kind == "v2pe" else coords
    size, theta = int(D * fraction), 2e4
    hf = PersimmonConfig(
        hidden_size=N * D,
        num_attention_heads=N,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction},
    )
    xt = torch.from_numpy(x).to(getattr(torch, dtype)).transpose(1, 2)
    cos, sin = PersimmonRotaryEmbedding(hf)(xt, torch.from_numpy(coords[..., 0]))
    turned = persimmon_rotate(xt[..., :size], xt[..., :size], cos, sin)[0]
    expected = torch.cat([turned, xt[..., size:]], dim=-1).transpose(1, 2).float().numpy()
    found = ours(coords_config(kind=kind, rope_theta=theta, rotary_fraction=fraction), x, coords, dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=DTYPES[dtype] * np.abs(x).max())
    np.testing.assert_array_equal(found[..., size:], expected[..., size:])


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def turned(x, position, theta):
    """Pairs (i, i + n / 2) of the last axis turned by position * theta^(-2i / n)."""
    n = x.shape[-1]
    angle = position[..., None, None] * theta ** (-np.arange(0, n, 2) / n)
    z = (x[..., : n // 2] + 1j * x[..., n // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def test_thw_split_attention():
    """SenseNova-U1 (specs: neo.md 13): half of a head follows t, a quarter h and w each; scale 1 / sqrt(d).

    One norm covers the T half, one the H and W quarters together, before they part.
    """
    theta, theta_hw = 5e6, 1e4
    config = rows.tiny_model(
        **{"coords.kind": "thw_split", "coords.rope_theta": theta, "coords.rope_theta_hw": theta_hw}
    )
    H, K, d, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps
    unbound = Attention(config)
    specs = params_lib.abstract(unbound)
    rng = np.random.default_rng(0)
    params = {path: rng.normal(0, 0.5, spec.shape).astype(np.float32) for path, spec in specs.items()}
    assert set(specs) == {
        *(f"qkv/{side}/weight" for side in "qkv"),
        *(f"qkv/{side}_norm{part}/weight" for side in "qk" for part in ("", "_hw")),
        "o/weight",
    }
    x, coords = rng.normal(size=(1, L, config.hidden_size)), rng.integers(0, 30, (1, L, 3)).astype(float)

    def side(name):
        z = np.einsum("BLD,DNd->BLNd", x, params[f"qkv/{name}/weight"].astype(float))
        if name == "v":
            return z
        t, hw = z[..., : d // 2], z[..., d // 2 :]
        t = rms(t, params[f"qkv/{name}_norm/weight"], eps)
        hw = rms(hw, params[f"qkv/{name}_norm_hw/weight"], eps)
        parts = (
            turned(t, coords[..., 0], theta),
            turned(hw[..., : d // 4], coords[..., 1], theta_hw),
            turned(hw[..., d // 4 :], coords[..., 2], theta_hw),
        )
        return np.concatenate(parts, axis=-1)

    q, k, v = side("q"), *(np.repeat(side(name), H // K, axis=2) for name in "kv")
    scores = np.einsum("BLNd,BSNd->BNLS", q, k) / np.sqrt(d)
    scores = np.where(np.tri(L, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("BNLS,BSNd,NdD->BLD", weights, v, params["o/weight"].astype(float))

    bound = params_lib.bind(unbound, params)
    table = rotary(bound.parts, jnp.asarray(coords, jnp.float32))
    ends = jnp.arange(1, L + 1, dtype=jnp.int32)[None]
    found, _ = bound(jnp.asarray(x, jnp.float32), table, Intervals(jnp.zeros_like(ends), ends))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("kind", "last", "t"),
    [
        ("1d", (6, 0, 0), 7),
        ("thw", (6, 9, 9), 7),  # h and w do not count text
        ("v2pe", (6.25, 0, 0), 8),  # behind an image at a whole number
        ("mrope", (6, 8, 7), 9),  # behind an image of 3 rows
        ("mrope", (6, 6, 6), 7),
    ],
)
def test_text_goes_on(kind, last, t):
    """Whatever stands in the padding of the row."""
    coords = jnp.asarray([[(0, 0, 0), last, (99, 99, 99)]], jnp.float32)
    after = t_behind(kind, coords, jnp.asarray([2]))
    np.testing.assert_array_equal(after, [t])
    expected = [[t, t, t] if kind == "mrope" else [t, 0, 0]]
    np.testing.assert_array_equal(text_coords(kind, after), expected)
