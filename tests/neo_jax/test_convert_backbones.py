"""Plain language models: saved by `transformers`, imported by our command, the same logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from data_pipelines import schema
from neo_jax import params as params_lib, restore, workdir as workdir_lib
from neo_jax.convert import backbones, files, ours
from neo_jax.convert.__main__ import main
from neo_jax.model.transformer import Transformer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
}
CASES = {
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_biases": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 6}),
    "mistral_whole": ("Mistral", {"sliding_window": None, "rope_theta": 3e4}),
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
}


def saved(folder, name, **changes):
    """A tiny random model of `transformers`, saved to a folder by itself."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms and biases start at one and zero, which hides mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def imported(folder, out, *flags):
    """(config, params) of the workdir that the command makes of a folder."""
    main(["import", f"--hf={folder}", f"--out={out}", *flags])
    config = workdir_lib.load_config(out)
    specs = params_lib.abstract(Transformer(config.model))
    load = ours.loader(restore.checkpoint_folder(out))
    return config, {path: load(path) for path in specs}


def text_batch(tokens, patch_dim):
    """Rows [B, L] of words, one document each, and a patch that is shown nowhere."""
    B, L = tokens.shape
    zeros = jnp.zeros((B, L), jnp.int32)
    t = jnp.broadcast_to(jnp.arange(L, dtype=jnp.float32), (B, L))
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "kinds": jnp.full((B, L), schema.TEXT, jnp.int32),
        "segment_ids": zeros + 1,
        "image_ids": zeros,
        "coords": jnp.stack([t, t * 0, t * 0], axis=-1),
        "patch_index": zeros - 1,
        "patches": jnp.zeros((B, 1, patch_dim), jnp.uint8),
        "patch_hw": jnp.zeros((B, 1, 2), jnp.int32),
    }


def logits(config, params, tokens):
    def run(params, batch):
        model = params_lib.bind(Transformer(config.model), params)
        return model.logits(model(batch))

    side = config.model.embed.patch_size * config.model.embed.merge_size
    return np.asarray(jax.jit(run)(params, text_batch(tokens, 3 * side**2)))


TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 17))


def expected(model):
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    name, changes = CASES[case]
    model = saved(tmp_path / "hf", name, **changes)
    config, params = imported(tmp_path / "hf", tmp_path / "out")
    assert params_lib.count(params_lib.abstract(Transformer(config.model))) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert config.family == name.lower()
    theirs = expected(model)
    assert np.abs(theirs).max() > 1  # a model with opinions
    np.testing.assert_allclose(logits(config, params, TOKENS), theirs, rtol=0, atol=1e-4)


def test_the_window_matters(tmp_path):
    """The case above would not notice a window that is ignored or off by one, were its logits the same."""
    windowed = saved(tmp_path / "a", "Mistral", sliding_window=6)
    for window in (5, 7, None):
        other = saved(tmp_path / str(window), "Mistral", sliding_window=window)
        assert np.abs(expected(windowed) - expected(other)).max() > 0.01


def test_config_written_is_the_config_read(tmp_path):
    """`transformers` reads what we write as it reads what it wrote itself."""
    for case, (name, changes) in CASES.items():
        model = saved(tmp_path / case / "hf", name, **changes)
        family = backbones.BACKBONES[name.lower()]
        hf = json.loads((tmp_path / case / "hf" / "config.json").read_text())
        config, params = imported(tmp_path / case / "hf", tmp_path / case / "out")
        folder = tmp_path / case / "back"
        folder.mkdir()
        files.write_folder(folder, list(family.table(config.model)), params.get)
        (folder / "config.json").write_text(json.dumps(family.hf_config(config.model, {}, 0, 0)))
        assert family.model_changes(json.loads((folder / "config.json").read_text())) == family.model_changes(
            hf
        )
        again = getattr(transformers, f"{name}ForCausalLM").from_pretrained(folder, dtype="float32").eval()
        np.testing.assert_allclose(expected(again), expected(model), rtol=0, atol=1e-5)


def test_internlm2_is_llama_rearranged(tmp_path):
    """InternLM2's names and fused rows, from a Llama: the same logits."""
    model = saved(tmp_path / "llama", "Llama", head_dim=8)
    llama = load_file(tmp_path / "llama" / "model.safetensors")
    N, K, d, D = 4, 2, 8, SIZES["hidden_size"]
    tensors = {
        "model.tok_embeddings.weight": llama["model.embed_tokens.weight"],
        "model.norm.weight": llama["model.norm.weight"],
        "output.weight": llama["lm_head.weight"],
    }
    renamed = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for i in range(SIZES["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        q, k, v = (llama[f"{layer}self_attn.{side}_proj.weight"] for side in "qkv")
        groups = []
        for group in range(K):
            groups += [q.reshape(N, d, D)[group * N // K + g] for g in range(N // K)]
            groups += [k.reshape(K, d, D)[group], v.reshape(K, d, D)[group]]
        tensors[f"{layer}attention.wqkv.weight"] = np.concatenate(groups)
        for new, old in renamed.items():
            tensors[f"{layer}{new}.weight"] = llama[f"{layer}{old}.weight"]
    folder = tmp_path / "internlm2"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    hf = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, **SIZES}
    hf |= {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    hf |= {"tie_word_embeddings": False, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(hf))
    config, params = imported(folder, tmp_path / "out")
    np.testing.assert_allclose(logits(config, params, TOKENS), expected(model), rtol=0, atol=1e-4)
