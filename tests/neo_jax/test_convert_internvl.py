"""Mono-InternVL, HoVLE and BREEN: tables, config.json both ways, the tile embedding against torch."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from neo_jax import params as params_lib, workdir as workdir_lib
from neo_jax.convert import breen, files, hovle, import_, mono_internvl, ours, table
from neo_jax.convert.families import FAMILIES, recognise
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from tests.neo_jax import families

CASES = {"mono_internvl": "mono_internvl_2b", "hovle": "hovle_2b", "breen": "breen_7b"}
SPECIAL = {"<IMG_CONTEXT>": 3, "<img>": 4, "</img>": 5}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    config = families.load(f"{CASES[request.param]}:tiny")
    specs = params_lib.abstract(Transformer(config.model))
    params = jax.device_get(jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(0)))
    return request.param, config.model, specs, params


def test_round_trip_is_identity(case):
    name, model, specs, params = case
    rows = list(FAMILIES[name].table(model))
    back = table.from_hf(specs, rows, table.to_hf(rows, params))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_an_exported_folder_reads_back(case, tmp_path):
    """With what released files hold beside it: a class vector, HoVLE's second table of words."""
    name, model, specs, params = case
    family, folder = FAMILIES[name], tmp_path / "hf"
    folder.mkdir()
    tile = model.embed.tile_size**2
    hf = family.hf_config(model, SPECIAL, tile, 4 * tile)
    (folder / "config.json").write_text(json.dumps(hf))
    rows = list(family.table(model))
    files.write_folder(folder, rows, params.get)
    unread = {
        "mono_internvl": [mono_internvl.VISION + "class_embedding"],
        "hovle": hovle.UNREAD,
        "breen": [],
    }[name]
    save_file({key: np.ones(3, np.float32) for key in unread}, tmp_path / "unread.safetensors")
    whole = load_file(folder / "model.safetensors") | load_file(tmp_path / "unread.safetensors")
    save_file(whole, folder / "model.safetensors")
    import_.run(folder, tmp_path / "run")
    config = workdir_lib.load_config(tmp_path / "run")
    assert config.stage.imported.max_pixels == 4 * tile
    back = ours.loader(tmp_path / "run" / "checkpoints" / "0")
    for path in specs:
        np.testing.assert_array_equal(back(path), params[path], err_msg=path)


@pytest.mark.parametrize("form", ["", ":tiny"])
@pytest.mark.parametrize("name", CASES)
def test_config_says_what_the_model_is(name, form):
    model = families.load(CASES[name] + form).model
    hf = FAMILIES[name].hf_config(model, SPECIAL, 448**2, 6 * 448**2)
    assert recognise(hf) == name
    for field, value in FAMILIES[name].model_changes(hf).items():
        ours = model
        for part in field.split("."):
            ours = ours[part]
        assert ours == value, field


def test_names_of_mono_internvl():
    """From internvl/model/internvl_chat/modeling_*.py and internlm2/modeling_internlm2_ve.py."""
    rows = {row.name: row.shape for row in mono_internvl.table(families.load("mono_internvl_2b").model)}
    expected = {
        "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_model.embeddings.position_embedding": (1, 1025, 1024),
        "mlp1.0.weight": (4096,),
        "mlp1.1.weight": (2048, 4096),
        "mlp1.3.weight": (2048, 2048),
        "language_model.model.tok_embeddings.weight": (92553, 2048),
        "language_model.model.layers.23.attention.wqkv.weight": (4096, 2048),
        "language_model.model.layers.23.feed_forward_ve.w2.weight": (2048, 8192),
        "language_model.model.layers.23.ffn_norm.weight": (2048,),
        "language_model.output.weight": (92553, 2048),
    }
    assert {name: rows.get(name) for name in expected} == expected
    assert mono_internvl.canonical("vision_model.embeddings.class_embedding") is None
    assert len(rows) == 24 * 10 + 3 + 6 + 3


def test_names_of_hovle():
    """The index of its files lists 236 tensors; two of them are not read."""
    rows = {row.name: row.shape for row in hovle.table(families.load("hovle_2b").model)}
    expected = {
        "embedding_model.encoder.0.attention.wo.weight": (2048, 2048),
        "embedding_model.encoder.7.feed_forward.w3.weight": (8192, 2048),
        "embedding_model.llm_text_embeddings.weight": (92553, 2048),
        "embedding_model.vision_embeddings.position_embedding": (1, 1025, 2048),
        "embedding_model.pixel_shuffle_proj.0.weight": (2048, 8192),
        "language_model.model.layers.0.attention_norm.weight": (2048,),
        "language_model.model.layers.23.feed_forward.w1.weight": (8192, 2048),
        "language_model.output.weight": (92553, 2048),
    }
    assert {name: rows.get(name) for name in expected} == expected
    unread = {name: hovle.canonical(name) for name in hovle.UNREAD}
    assert set(unread.values()) == {None} and not unread.keys() & rows.keys()
    assert len(rows) + len(unread) == 236


def test_refusals_of_hovle():
    model = families.load("hovle_2b").model
    hf = hovle.hf_config(model, SPECIAL, 448**2, 448**2)
    other = hf | {"embedding_config": hf["embedding_config"] | {"intermediate_size": 1}}
    with pytest.raises(UserError, match="intermediate_size 1, llm_config has 8192"):
        hovle.model_changes(other)
    with pytest.raises(UserError, match="use_ls"):
        hovle.model_changes(hf | {"embedding_config": hf["embedding_config"] | {"use_ls": True}})


def test_dynamic_rope_scaling_is_passed_over_and_no_other():
    model = families.load("mono_internvl_2b").model
    hf = mono_internvl.hf_config(model, SPECIAL, 448**2, 448**2)

    def scaled(kind):
        return hf | {"llm_config": hf["llm_config"] | {"rope_scaling": {"type": kind, "factor": 2.0}}}

    assert mono_internvl.model_changes(scaled("dynamic")) == mono_internvl.model_changes(hf)
    with pytest.raises(UserError, match="linear"):
        mono_internvl.model_changes(scaled("linear"))


@pytest.mark.parametrize("name", ["mono_internvl", "hovle"])
def test_tile_embedding_equals_torch(name):
    """Convolution, positions, space to depth and MLP of two tiles in torch, from the checkpoint's tensors."""
    config = families.load(f"{CASES[name]}:tiny")
    model, rng = config.model, np.random.default_rng(0)
    side = model.embed.tile_size // (model.embed.patch_size * model.embed.merge_size)
    unbound = Transformer(model)
    specs = params_lib.abstract(unbound)
    params = jax.device_get(jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(0)))
    document = families.document(config, rng, grids=((side, side), (side, side)), words=(2, 3, 1))
    batch = families.stack(config, [[document]])
    bound = params_lib.bind(unbound, jax.tree.map(jax.numpy.asarray, params))
    found = np.asarray(bound.patch_embed(batch))[batch["patch_index"] >= 0]

    theirs = {
        key: torch.from_numpy(np.array(value))
        for key, value in table.to_hf(FAMILIES[name].table(model), params).items()
    }
    vision = mono_internvl.VISION if name == "mono_internvl" else hovle.VISION
    step = model.embed.patch_size * model.embed.merge_size
    pixels = document.load_patches().reshape(2, side, side, step, step, 3)
    pixels = pixels.transpose(0, 5, 1, 3, 2, 4).reshape(2, 3, side * step, side * step)
    mean, std = (np.reshape(model.embed[key], (3, 1, 1)) for key in ("pixel_mean", "pixel_std"))
    x = torch.from_numpy((pixels / 255 - mean) / std).float()
    weight, bias = theirs[vision + "patch_embedding.weight"], theirs[vision + "patch_embedding.bias"]
    x = functional.conv2d(x, weight, bias, stride=model.embed.patch_size)
    grid = x.shape[-1]
    positions = theirs[vision + "position_embedding"][:, 1:].reshape(1, grid, grid, -1)
    x = x.permute(0, 2, 3, 1) + positions
    m = model.embed.merge_size
    x = x.reshape(2, grid // m, m, grid // m, m, -1).permute(0, 1, 3, 2, 4, 5).reshape(2 * side * side, -1)
    if name == "mono_internvl":
        x = functional.layer_norm(x, x.shape[-1:], theirs["mlp1.0.weight"], theirs["mlp1.0.bias"])
        mlp = "mlp1.1", "mlp1.3"
    else:
        mlp = "embedding_model.pixel_shuffle_proj.0", "embedding_model.pixel_shuffle_proj.2"
    up, out = ((theirs[f"{key}.weight"], theirs[f"{key}.bias"]) for key in mlp)
    x = functional.linear(functional.gelu(functional.linear(x, *up)), *out)
    np.testing.assert_allclose(found, x.numpy(), atol=2e-5)


def test_breen_names_are_unlike_any_other():
    model = families.load("breen_7b").model
    names = {row.name for row in breen.table(model)}
    assert "model.layers.27.mlp_image.gate_proj.weight" in names
    assert "model.learnable_queries" in names
