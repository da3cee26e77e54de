"""Tables between Hugging Face's tensors and ours: the transforms against their definitions, bad tables."""

import numpy as np
import pytest

from neo_jax import params as params_lib
from neo_jax.convert import backbones, table
from neo_jax.convert.families import recognise
from neo_jax.convert.table import Row
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from tests.neo_jax import rows

D, N, K, d = 10, 6, 2, 4


def specs(**shapes):
    axes = {len(shape): ("x",) * len(shape) for shape in shapes.values()}
    return {
        name: params_lib.ParamSpec(shape, axes[len(shape)], params_lib.zeros, decays=True)
        for name, shape in shapes.items()
    }


def both_ways(row, tensor, **shapes):
    """Our slices of an HF tensor, after checking that they give it back."""
    parts = table.to_ours(specs(**shapes), row, tensor)
    assert [part.shape for part in parts] == [shapes[path][row.at is not None :] for path in row.paths]
    back = table.to_theirs(
        row,
        {
            path: part if row.at is None else np.stack([part] * (row.at + 1))
            for path, part in zip(row.paths, parts, strict=True)
        },
    )
    np.testing.assert_array_equal(back, tensor)
    return parts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [N // K, 1])
def test_grouped_qkv(bias, groups):
    """Head by head, as InternLM2 (rearrange "(k g+2 d)") and Persimmon (view heads, 3, d) read their rows."""
    heads = K * groups
    inputs = () if bias else (D,)
    fused = np.random.default_rng(0).normal(size=((heads + 2 * K) * d, *inputs))
    shapes = {"q": (3, *inputs, heads, d), "k": (3, *inputs, K, d), "v": (3, *inputs, K, d)}
    q, k, v = both_ways(Row("w", fused.shape, "grouped_qkv", ("q", "k", "v"), 2), fused, **shapes)
    for group in range(K):
        rows = fused[group * (groups + 2) * d :][: (groups + 2) * d]
        for g in range(groups):
            np.testing.assert_array_equal(q[..., group * groups + g, :], rows[g * d :][:d].T)
        np.testing.assert_array_equal(k[..., group, :], rows[groups * d :][:d].T)
        np.testing.assert_array_equal(v[..., group, :], rows[(groups + 1) * d :][:d].T)


def test_below():
    """EVE's kv: the rows of k, then those of v."""
    fused = np.random.default_rng(0).normal(size=(12, D))
    k, v = both_ways(Row("kv", (12, D), "below", ("k", "v")), fused, k=(D, 2, 4), v=(D, 4))
    np.testing.assert_array_equal(k.reshape(D, 8), fused[:8].T)
    np.testing.assert_array_equal(v, fused[8:].T)


def test_convolution_and_flattened_patches_agree():
    """A matrix over (rgb, y, x) patches is the same kernel as a convolution of that side."""
    kernel = np.random.default_rng(0).normal(size=(D, 3, 4, 4))
    [conv] = both_ways(Row("w", kernel.shape, "conv", ("w",)), kernel, w=(48, D))
    flat = kernel.reshape(D, 48)
    [linear] = both_ways(Row("w", flat.shape, "linear_chw", ("w",)), flat, w=(48, D))
    np.testing.assert_array_equal(linear, conv)
    pixels = np.random.default_rng(1).normal(size=(4, 4, 3))  # (y, x, rgb), the order of `patches`
    np.testing.assert_allclose(pixels.ravel() @ conv, np.einsum("ocyx,yxc->o", kernel, pixels))


@pytest.mark.parametrize("names", [backbones.LLAMA, backbones.INTERNLM2, backbones.PERSIMMON])
def test_every_kind_of_decoder_is_covered(names):
    """No parameter of a decoder with everything switched on is left out or filled twice."""
    config = rows.tiny_model(
        **{"norm": "layer", "qk_norm": "layer", "attention_bias": ("q", "k", "v", "o"), "mlp_bias": True},
        **{"route.attention": "modality", "route.mlp": "modality", "route.norm": "modality"},
        **{"embed.kind": "none"},
    )
    model_specs = params_lib.abstract(Transformer(config))
    table_rows = list(backbones.decoder(config, "llm.", names, visual=lambda name: "visual_" + name))
    table.check_cover(model_specs, table_rows)
    assert len({row.name for row in table_rows}) == len(table_rows)
    with pytest.raises(ValueError, match="fills token_embed"):
        table.check_cover(model_specs, table_rows[1:])
    with pytest.raises(ValueError, match="fills token_embed"):
        table.check_cover(model_specs, [table_rows[0], *table_rows])
    with pytest.raises(ValueError, match="no parameter other"):
        table.check_cover(model_specs, [table_rows[0]._replace(paths=("other",))])


def test_families_are_recognised_by_what_they_hold():
    assert recognise({"model_type": "qwen3"}) == "qwen3"
    assert recognise({"model_type": "internvl_chat", "llm_config": {"rope_theta_hw": 1e4}}) == "neo"
    with pytest.raises(UserError, match=r"no known family \(model_type 'gpt2'.*neo, .*qwen3"):
        recognise({"model_type": "gpt2"})
