"""EVEv2 checkpoints (EVEQwen2ForCausalLM; specs: solo_eve_evev2_fuyu.md sections 3.4 and 3.6)."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.backbones import decoder, plain_config, text_changes
from neo_jax.convert.eve import CLIP_MEAN, CLIP_STD
from neo_jax.convert.table import Family, Row
from neo_jax.errors import UserError

# Parts of a layer that "moe_part" may name -> the field of model.route.
PARTS = {"layernorm": "norm", "self_attn": "attention", "mlp": "mlp"}


# Parts -> names of the modules of which a layer has a copy then.
COPIED = {
    "layernorm": ("input_layernorm", "post_attention_layernorm"),
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("mlp",),
}


def matches(hf: Mapping[str, Any]) -> bool:
    return hf.get("model_type") == "eve-qwen2" or "EVEQwen2ForCausalLM" in (hf.get("architectures") or ())


def visual_name(name: str) -> str:
    """The visual copy of a tensor inside a layer: "moe_" before the module that is copied."""
    inside = "self_attn." if name.startswith("self_attn.") else ""
    return f"{inside}moe_{name.removeprefix(inside)}"


def table(model: ConfigDict) -> Iterator[Row]:
    D, C = model.hidden_size, model.embed.hidden_size
    p, m = model.embed.patch_size, model.embed.merge_size
    tower = "model.vision_tower."
    for slot, name in enumerate(("class_embedding", "split_embedding")):
        yield Row(tower + name, (D,), "copy", ("patch_embed/slots/vectors",), slot)
    yield Row(tower + "patch_embedding.0.weight", (C, 3, p, p), "conv", ("patch_embed/patch/weight",))
    yield Row(tower + "patch_embedding.0.bias", (C,), "copy", ("patch_embed/patch/bias",))
    yield Row(tower + "patch_embedding.2.weight", (D, C, m, m), "conv", ("patch_embed/merge/weight",))
    yield Row(tower + "patch_embedding.2.bias", (D,), "copy", ("patch_embed/merge/bias",))
    yield from decoder(model, visual=visual_name)


def routed_parts(hf: Mapping[str, Any]) -> set[str]:
    """The parts of a layer, of PARTS, that image tokens have a copy of."""
    if not fields.read(hf, "add_moe", bool, False):
        return set()
    parts = set(fields.read(hf, "moe_part", str, "-".join(PARTS)).split("-"))
    if unknown := sorted(parts - set(PARTS)):
        raise UserError(f"config.json: moe_part names {unknown[0]!r}; known are {', '.join(PARTS)}")
    return parts


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Processor settings, which are in a folder of their own, default to the published ones."""
    parts = routed_parts(hf)
    return (
        text_changes(hf)
        | {
            "pre_buffer": 0,
            "mlp": "swiglu",
            "norm": "rms",
            "qk_norm": "none",
            "attention_bias": ("q", "k", "v"),
            "tie_embeddings": bool(fields.tied(hf)),
            "mask": "causal",
            "embed.kind": "conv_gelu_conv",
            "embed.rotate": False,
            "embed.slots": 2,
            "embed.patch_size": fields.read(hf, "patch_stride", int, 16),
            "embed.merge_size": fields.read(hf, "dense_stride", int, 2),
            "embed.hidden_size": fields.read(hf, "mm_hidden_size", int),
            "embed.pixel_mean": CLIP_MEAN,
            "embed.pixel_std": CLIP_STD,
            "coords.kind": "1d",
        }
        | {f"route.{ours}": "modality" if part in parts else "shared" for part, ours in PARTS.items()}
    )


def hf_config(
    model: ConfigDict, special: Mapping[str, int], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """The config.json; max_size bounds the side of a square of the same area as an image."""
    parts = [part for part, ours in PARTS.items() if model.route[ours] == "modality"]
    return plain_config("qwen2", "EVEQwen2ForCausalLM", model) | {
        "model_type": "eve-qwen2",
        "add_moe": bool(parts),
        "moe_part": "-".join(parts),
        "mm_hidden_size": model.embed.hidden_size,
        "max_size": round(max_pixels**0.5),
        "patch_stride": model.embed.patch_size,
        "dense_stride": model.embed.merge_size,
    }


def pixels(hf: Mapping[str, Any]) -> tuple[int, int]:
    """Images are enlarged or shrunk to an area of max_size^2; 1600 in the released model."""
    side = fields.read(hf, "patch_stride", int, 16) * fields.read(hf, "dense_stride", int, 2)
    return side**2, fields.read(hf, "max_size", int, 1600) ** 2


EVEV2 = Family(
    matches,
    model_changes,
    table,
    hf_config,
    data={"layout": "evev2", "resize": "evev2_eval", "template": "evev2"},
    pixels=pixels,
)
