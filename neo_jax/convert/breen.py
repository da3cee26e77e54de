"""BREEN checkpoints (specs: methods.md 1.5): Qwen2.5 with an image network and learned queries.

Neither code nor weights of BREEN are public. These names are ours: Qwen2's for the language model,
`mlp_image` for the network of image tokens and queries, EVEv2's for the patch embedding,
`model.learnable_queries`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.backbones import decoder, plain_config, text_changes
from neo_jax.convert.table import Family, Row

VISION = "model.vision_tower.patch_embedding."


def matches(hf: Mapping[str, Any]) -> bool:
    return hf.get("model_type") == "breen"


def table(model: ConfigDict) -> Iterator[Row]:
    D, C = model.hidden_size, model.embed.hidden_size
    p, m = model.embed.patch_size, model.embed.merge_size
    yield Row(VISION + "0.weight", (C, 3, p, p), "conv", ("patch_embed/patch/weight",))
    yield Row(VISION + "0.bias", (C,), "copy", ("patch_embed/patch/bias",))
    yield Row(VISION + "2.weight", (D, C, m, m), "conv", ("patch_embed/merge/weight",))
    yield Row(VISION + "2.bias", (D,), "copy", ("patch_embed/merge/bias",))
    shape = (model.embed.slots, D)
    yield Row("model.learnable_queries", shape, "copy", ("patch_embed/slots/vectors",))
    yield from decoder(model, visual=lambda name: name.replace("mlp.", "mlp_image."))


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    vision = fields.section(hf, "vision_config")
    return text_changes(hf) | {
        "pre_buffer": 0,
        "mlp": "swiglu",
        "norm": "rms",
        "qk_norm": "none",
        "attention_bias": ("q", "k", "v"),
        "tie_embeddings": bool(fields.tied(hf)),
        "mask": "causal",
        "sliding_window": 0,
        "embed.kind": "conv_gelu_conv",
        "embed.rotate": False,
        "embed.patch_size": fields.read(vision, "patch_size", int),
        "embed.merge_size": fields.read(vision, "merge_size", int),
        "embed.hidden_size": fields.read(vision, "hidden_size", int),
        "embed.slots": fields.read(hf, "num_queries", int),
        "coords.kind": "1d",
        "route.mlp": "modality",
    }


def hf_config(
    model: ConfigDict, special: Mapping[str, int], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """The config.json of a BREEN checkpoint; `special` has the ids of <IMG_CONTEXT>, <img> and </img>."""
    return plain_config("qwen2", "BreenForCausalLM", model) | {
        "model_type": "breen",
        "dtype": "float32",
        "img_context_token_id": special["<IMG_CONTEXT>"],
        "img_start_token_id": special["<img>"],
        "img_end_token_id": special["</img>"],
        "num_queries": model.embed.slots,
        "vision_config": {
            "hidden_size": model.embed.hidden_size,
            "patch_size": model.embed.patch_size,
            "merge_size": model.embed.merge_size,
            "num_channels": 3,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
        },
    }


def pixels(hf: Mapping[str, Any]) -> tuple[int, int]:
    vision = fields.section(hf, "vision_config")
    return fields.read(vision, "min_pixels", int), fields.read(vision, "max_pixels", int)


BREEN = Family(
    matches,
    model_changes,
    table,
    hf_config,
    data={"layout": "breen", "resize": "evev2", "template": "chatml"},
    pixels=pixels,
)
