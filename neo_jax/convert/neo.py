"""NEO checkpoints (model_type "neo_chat"; specs: neo.md sections 1 and 9)."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.backbones import decoder, text_changes
from neo_jax.convert.table import Family, Row


def matches(hf: Mapping[str, Any]) -> bool:
    """By what it holds: released files are said to carry another family's model_type."""
    llm = hf.get("llm_config")
    return hf.get("model_type") == "neo_chat" or (isinstance(llm, Mapping) and "rope_theta_hw" in llm)


def table(model: ConfigDict) -> Iterator[Row]:
    D, C = model.hidden_size, model.embed.hidden_size
    p, m = model.embed.patch_size, model.embed.merge_size
    vision = "vision_model.embeddings."
    yield Row(vision + "patch_embedding.weight", (C, 3, p, p), "conv", ("patch_embed/patch/weight",))
    yield Row(vision + "patch_embedding.bias", (C,), "copy", ("patch_embed/patch/bias",))
    yield Row(vision + "dense_embedding.weight", (D, C, m, m), "conv", ("patch_embed/merge/weight",))
    yield Row(vision + "dense_embedding.bias", (D,), "copy", ("patch_embed/merge/bias",))
    yield from decoder(model, prefix="language_model.")


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    llm, vision = fields.section(hf, "llm_config"), fields.section(hf, "vision_config")
    return text_changes(llm) | {
        "pre_buffer": fields.read(llm, "extra_num_layers", int, 0),
        "mlp": "swiglu",
        "norm": "rms",
        "qk_norm": "rms",
        "tie_embeddings": bool(fields.tied(llm, hf)),
        "mask": "image_bidirectional",
        "embed.kind": "conv_gelu_conv",
        "embed.patch_size": fields.read(vision, "patch_size", int),
        "embed.merge_size": round(1 / fields.read(vision, "downsample_ratio", float)),
        "embed.hidden_size": fields.read(vision, "hidden_size", int),
        "embed.rotate": True,
        "embed.rope_theta": fields.read(vision, "rope_theta_vision", float),
        "coords.kind": "thw",
        "coords.rope_theta_hw": fields.read(llm, "rope_theta_hw", float),
    }


def hf_config(
    model: ConfigDict, special: Mapping[str, int], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """The config.json of a NEO checkpoint; `special` has the ids of <IMG_CONTEXT> and <img>."""
    return {
        "architectures": ["NEOChatModel"],
        "model_type": "neo_chat",
        "dtype": "float32",
        "hidden_size": model.hidden_size,
        "img_context_token_id": special["<IMG_CONTEXT>"],
        "img_start_token_id": special["<img>"],
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


def pixels(hf: Mapping[str, Any]) -> tuple[int, int]:
    vision = fields.section(hf, "vision_config")
    return fields.read(vision, "min_pixels", int, 65536), fields.read(vision, "max_pixels", int, 4194304)


NEO = Family(
    matches,
    model_changes,
    table,
    hf_config,
    data={"layout": "neo", "resize": "neo", "template": "chatml"},
    pixels=pixels,
)
