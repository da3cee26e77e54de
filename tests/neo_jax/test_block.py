"""Whole decoder layers and norms against transformers and torch, in float32 and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import LayerNorm as TorchLayerNorm
from transformers import PersimmonConfig, Qwen2Config, Qwen3Config
from transformers.models.persimmon.modeling_persimmon import PersimmonDecoderLayer, PersimmonRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from neo_jax import params as params_lib
from neo_jax.convert import table
from neo_jax.convert.backbones import LLAMA, PERSIMMON, decoder
from neo_jax.model.block import Block
from neo_jax.model.coords import rotary
from neo_jax.model.mask import Intervals
from neo_jax.model.norm import LayerNorm, RMSNorm
from neo_jax.model.patches import gelu
from tests.neo_jax import rows

B, L, D, HEADS, KV_HEADS, MLP, THETA, EPS = 2, 9, 32, 4, 2, 48, 1e4, 1e-5
SHARED = {
    "hidden_size": D,
    "num_heads": HEADS,
    "head_dim": D // HEADS,
    "mlp_size": MLP,
    "norm_eps": EPS,
    "coords.kind": "1d",
    "coords.rope_theta": THETA,
    "num_layers": 1,
    "pre_buffer": 0,
}
HF = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "attn_implementation": "eager",
}
GQA = HF | {
    "num_key_value_heads": KV_HEADS,
    "head_dim": D // HEADS,
    "rms_norm_eps": EPS,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}
# kind -> (config, layer, rotary, our changes, HF names)
LAYERS = {
    "persimmon": (
        PersimmonConfig(
            **HF,
            layer_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5},
        ),
        PersimmonDecoderLayer,
        PersimmonRotaryEmbedding,
        {
            "num_kv_heads": HEADS,
            "norm": "layer",
            "qk_norm": "layer",
            "mlp": "relu2",
            "mlp_bias": True,
            "attention_bias": ("q", "k", "v", "o"),
            "coords.rotary_fraction": 0.5,
        },
        PERSIMMON,
    ),
    "qwen2": (
        Qwen2Config(**GQA),
        Qwen2DecoderLayer,
        Qwen2RotaryEmbedding,
        {"num_kv_heads": KV_HEADS, "qk_norm": "none", "attention_bias": ("q", "k", "v")},
        LLAMA,
    ),
    "qwen3": (
        Qwen3Config(**GQA),
        Qwen3DecoderLayer,
        Qwen3RotaryEmbedding,
        {"num_kv_heads": KV_HEADS, "qk_norm": "rms"},
        LLAMA,
    ),
}


@pytest.fixture(scope="module", params=LAYERS)
def layer(request):
    """(the transformers layer with random weights, its rotary, our block's config, our parameters)."""
    hf, layer_class, rotary_class, changes, names = LAYERS[request.param]
    torch.manual_seed(0)
    theirs = layer_class(hf, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    config = rows.tiny_model(**(SHARED | changes))
    specs = params_lib.abstract(Block(config))
    prefix = names.layer.format(0)
    tensors = {prefix + name: x.numpy() for name, x in theirs.state_dict().items()}
    layer_rows = [row for row in decoder(config, names=names) if row.name in tensors]
    assert len(layer_rows) == len(tensors)
    params: dict = {}
    for row in layer_rows:
        paths = tuple(path.removeprefix("layers/") for path in row.paths)
        parts = table.to_ours(specs, row._replace(paths=paths, at=None), tensors[row.name])
        params |= dict(zip(paths, parts, strict=True))
    assert set(params) == set(specs)
    return theirs, rotary_class(hf), config, params


def run_theirs(theirs, rotary_embedding, x, dtype):
    module, xt = theirs.to(dtype), torch.from_numpy(x).to(dtype)
    positions = torch.arange(L)[None].expand(B, L)
    mask = torch.full((L, L), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    with torch.no_grad():
        out = module(xt, attention_mask=mask, position_embeddings=rotary_embedding(xt, positions))
    return (out[0] if isinstance(out, tuple) else out).float().numpy()


def run_ours(config, params, x, dtype):
    block = params_lib.bind(Block(config), {path: jnp.asarray(p) for path, p in params.items()})
    coords = jnp.zeros((B, L, 3)).at[..., 0].set(jnp.arange(L, dtype=jnp.float32)[None])
    ends = jnp.broadcast_to(jnp.arange(1, L + 1, dtype=jnp.int32), (B, L))

    def run(x):
        out, *_ = block(x, rotary(block.attention.parts, coords), Intervals(jnp.zeros_like(ends), ends))
        return out

    return np.asarray(jax.jit(run)(jnp.asarray(x, dtype)).astype(jnp.float32))


def test_layer(layer):
    """float32 within rounding; in bfloat16 no further from float32 than transformers' own bfloat16 is."""
    theirs, rotary_embedding, config, params = layer
    x = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
    x = np.array(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    exact = run_theirs(theirs.double(), rotary_embedding, x, torch.float64)
    scale = np.abs(exact).max()
    np.testing.assert_allclose(run_ours(config, params, x, jnp.float32), exact, rtol=0, atol=2e-6 * scale)

    half = {path: np.asarray(jnp.asarray(p, jnp.bfloat16).astype(jnp.float32)) for path, p in params.items()}
    rounded = {name: p.bfloat16().double() for name, p in theirs.state_dict().items()}
    theirs.load_state_dict(rounded)
    exact = run_theirs(theirs.double(), rotary_embedding, x, torch.float64)
    error = np.abs(run_ours(config, half, x, jnp.bfloat16) - exact).mean()
    expected = np.abs(run_theirs(theirs, rotary_embedding, x, torch.bfloat16) - exact).mean()
    assert 0 < error < 1.5 * expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind, dtype):
    """In bfloat16 bit by bit: Qwen3 rounds before the weight, torch's LayerNorm after weight and bias."""
    size = 64
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (5, size)).astype(np.float32)
    weight, bias = rng.normal(1, 0.5, (2, size)).astype(np.float32)
    weight, bias = (np.array(jnp.asarray(p, dtype).astype(jnp.float32)) for p in (weight, bias))
    if kind == "rms":
        theirs, ours = Qwen3RMSNorm(size, eps=EPS), RMSNorm(size, "embed", EPS)
        params = {"weight": weight}
    else:
        theirs, ours = TorchLayerNorm(size, eps=EPS), LayerNorm(size, "embed", EPS)
        params = {"weight": weight, "bias": bias}
    theirs.load_state_dict({name: torch.from_numpy(p) for name, p in params.items()})
    torch_dtype = getattr(torch, dtype)
    with torch.no_grad():
        expected = theirs.to(torch_dtype)(torch.from_numpy(x).to(torch_dtype)).float().numpy()
    bound = params_lib.bind(ours, {name: jnp.asarray(p) for name, p in params.items()})
    found = np.asarray(bound(jnp.asarray(x, dtype)).astype(jnp.float32))
    if dtype == "float32":
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
    else:
        # A sum in another order may tip a value that lies on the border of two roundings.
        assert (found == expected).mean() > 0.99


def test_gelu_in_bfloat16():
    x = np.random.default_rng(0).normal(0, 2, 4096).astype(np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(x).bfloat16()).float().numpy()
    found = np.asarray(gelu(jnp.asarray(x, jnp.bfloat16)).astype(jnp.float32))
    assert (found == expected).mean() > 0.95
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-6)
