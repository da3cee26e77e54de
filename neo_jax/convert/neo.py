"""NEO checkpoints (Hugging Face layout, model_type "neo_chat") to and from ours.

One table of (our path, layer, HF name, HF shape, kind) serves import and export. HF linears are (out, in)
and convolutions (out, in, kh, kw); ours are (in..., out...), and rows of a convolution kernel follow the
pixel order of `patches` (y, x, rgb).
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from safetensors import numpy as safetensors

from data_pipelines.text import Tokenizer
from neo_jax.errors import UserError
from neo_jax.params import ParamSpec


class Row(NamedTuple):
    """One HF tensor: where it lives on either side and how the two layouts correspond."""

    path: str  # our parameter
    layer: int | None  # index along its "layers" axis, None when not stacked
    name: str  # HF tensor
    shape: tuple[int, ...]  # HF shape
    kind: str  # key of TO_OURS and TO_HF


Transform = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
TO_OURS: dict[str, Transform] = {
    "copy": lambda x, shape: x.reshape(shape),
    "linear": lambda x, shape: x.T.reshape(shape),
    "conv": lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
}
TO_HF: dict[str, Transform] = {
    "copy": lambda x, shape: x.reshape(shape),
    "linear": lambda x, shape: x.reshape(shape[::-1]).T,
    "conv": lambda x, shape: x.reshape(*shape[2:], shape[1], shape[0]).transpose(3, 2, 0, 1),
}


def table(model: ConfigDict) -> Iterator[Row]:
    """All tensors of a NEO checkpoint for our model config."""
    D, F, N, K, d = (
        model.hidden_size,
        model.mlp_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
    )
    C, p, m = model.embed.hidden_size, model.embed.patch_size, model.embed.merge_size
    vision = "vision_model.embeddings."
    yield Row("patch_embed/patch/weight", None, vision + "patch_embedding.weight", (C, 3, p, p), "conv")
    yield Row("patch_embed/patch/bias", None, vision + "patch_embedding.bias", (C,), "copy")
    yield Row("patch_embed/merge/weight", None, vision + "dense_embedding.weight", (D, C, m, m), "conv")
    yield Row("patch_embed/merge/bias", None, vision + "dense_embedding.bias", (D,), "copy")
    llm = "language_model.model."
    yield Row("token_embed", None, llm + "embed_tokens.weight", (model.vocab_size, D), "copy")
    layer_rows = {
        "attention_norm/weight": ("input_layernorm.weight", (D,), "copy"),
        "attention/qkv/q/weight": ("self_attn.q_proj.weight", (N * d, D), "linear"),
        "attention/qkv/q_hw/weight": ("self_attn.q_proj_hw.weight", (N * d, D), "linear"),
        "attention/qkv/k/weight": ("self_attn.k_proj.weight", (K * d, D), "linear"),
        "attention/qkv/k_hw/weight": ("self_attn.k_proj_hw.weight", (K * d, D), "linear"),
        "attention/qkv/v/weight": ("self_attn.v_proj.weight", (K * d, D), "linear"),
        "attention/o/weight": ("self_attn.o_proj.weight", (D, N * d), "linear"),
        "attention/qkv/q_norm/weight": ("self_attn.q_norm.weight", (d,), "copy"),
        "attention/qkv/q_norm_h/weight": ("self_attn.q_norm_h.weight", (d // 2,), "copy"),
        "attention/qkv/q_norm_w/weight": ("self_attn.q_norm_w.weight", (d // 2,), "copy"),
        "attention/qkv/k_norm/weight": ("self_attn.k_norm.weight", (d,), "copy"),
        "attention/qkv/k_norm_h/weight": ("self_attn.k_norm_h.weight", (d // 2,), "copy"),
        "attention/qkv/k_norm_w/weight": ("self_attn.k_norm_w.weight", (d // 2,), "copy"),
        "mlp_norm/weight": ("post_attention_layernorm.weight", (D,), "copy"),
        "mlp/gate/weight": ("mlp.gate_proj.weight", (F, D), "linear"),
        "mlp/up/weight": ("mlp.up_proj.weight", (F, D), "linear"),
        "mlp/down/weight": ("mlp.down_proj.weight", (D, F), "linear"),
    }
    for index in range(model.num_layers):
        stack, layer = (
            ("pre_buffer", index) if index < model.pre_buffer else ("layers", index - model.pre_buffer)
        )
        for path, (name, shape, kind) in layer_rows.items():
            yield Row(f"{stack}/{path}", layer, f"{llm}layers.{index}.{name}", shape, kind)
    yield Row("norm/weight", None, llm + "norm.weight", (D,), "copy")
    if not model.tie_embeddings:
        yield Row("head", None, "language_model.lm_head.weight", (model.vocab_size, D), "linear")


def from_hf(
    model: ConfigDict, specs: Mapping[str, ParamSpec], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our parameters, float32, from HF tensors.

    Raises:
        UserError: a tensor that is missing, left over or of another shape, named with both shapes.
    """
    rows = list(table(model))
    names = {row.name for row in rows}
    if missing := sorted(names - set(tensors)):
        raise UserError(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}")
    if extra := sorted(set(tensors) - names):
        raise UserError(f"the checkpoint has {len(extra)} tensors the config does not know, first {extra[0]}")
    params: dict[str, np.ndarray] = {path: np.empty(spec.shape, np.float32) for path, spec in specs.items()}
    for row in rows:
        tensor = tensors[row.name]
        if tensor.shape != row.shape:
            raise UserError(f"{row.name} has shape {tensor.shape}, the config needs {row.shape}")
        target = params[row.path] if row.layer is None else params[row.path][row.layer]
        target[...] = TO_OURS[row.kind](tensor.astype(np.float32), target.shape)
    return params


def to_hf(model: ConfigDict, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """HF tensors from our parameters."""
    tensors = {}
    for row in table(model):
        value = np.asarray(params[row.path])
        value = value if row.layer is None else value[row.layer]
        tensors[row.name] = np.ascontiguousarray(TO_HF[row.kind](value, row.shape))
    return tensors


def hf_config(model: ConfigDict, tokenizer: Tokenizer, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """The `config.json` of a NEO checkpoint (specs: neo.md section 1) for our model config.

    `tokenizer` gives the special-token ids (data_pipelines.text.Tokenizer).
    """
    return {
        "architectures": ["NEOChatModel"],
        "model_type": "neo_chat",
        "dtype": "float32",
        "hidden_size": model.hidden_size,
        "img_context_token_id": tokenizer.image_context,
        "img_start_token_id": tokenizer.image_start,
        "tie_word_embeddings": model.tie_embeddings,
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.mlp_size,
            "num_hidden_layers": model.num_layers,
            "extra_num_layers": model.pre_buffer,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.coords.rope_theta,
            "rope_theta_hw": model.coords.rope_theta_hw,
            "max_position_embeddings": 32768,
            "max_position_embeddings_hw": 10000,
            "tie_word_embeddings": model.tie_embeddings,
            "initializer_range": model.init_std,
        },
        "vision_config": {
            "model_type": "neo_vision",
            "hidden_size": model.embed.hidden_size,
            "llm_hidden_size": model.hidden_size,
            "patch_size": model.embed.patch_size,
            "downsample_ratio": 1 / model.embed.merge_size,
            "num_channels": 3,
            "rope_theta_vision": model.embed.rope_theta,
            "max_position_embeddings_vision": 10000,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
        },
    }


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of configs/base.py `model()` that a NEO config.json decides, as dotted names -> values."""
    llm, vision = hf["llm_config"], hf["vision_config"]
    return {
        "vocab_size": llm["vocab_size"],
        "hidden_size": llm["hidden_size"],
        "num_layers": llm["num_hidden_layers"],
        "pre_buffer": llm.get("extra_num_layers", 0),
        "num_heads": llm["num_attention_heads"],
        "num_kv_heads": llm["num_key_value_heads"],
        "head_dim": llm["head_dim"],
        "mlp_size": llm["intermediate_size"],
        "tie_embeddings": llm.get("tie_word_embeddings", hf.get("tie_word_embeddings", False)),
        "norm_eps": llm["rms_norm_eps"],
        "embed.kind": "conv_gelu_conv",
        "embed.patch_size": vision["patch_size"],
        "embed.merge_size": round(1 / vision["downsample_ratio"]),
        "embed.hidden_size": vision["hidden_size"],
        "embed.rope_theta": vision["rope_theta_vision"],
        "coords.kind": "thw",
        "coords.rope_theta": llm["rope_theta"],
        "coords.rope_theta_hw": llm["rope_theta_hw"],
    }


def export(
    folder: pathlib.Path,
    model: ConfigDict,
    params: Mapping[str, np.ndarray],
    tokenizer_file: pathlib.Path,
    min_pixels: int,
    max_pixels: int,
) -> None:
    """Writes config.json, model.safetensors and tokenizer.json; the folder appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = hf_config(model, Tokenizer(tokenizer_file), min_pixels, max_pixels)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.save_file(to_hf(model, params), partial / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer_file, partial / "tokenizer.json")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
