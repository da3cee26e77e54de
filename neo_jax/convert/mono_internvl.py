"""Mono-InternVL checkpoints (specs: methods.md 1.3): InternLM2 with `feed_forward_ve` beside `feed_forward`.

Names and shapes are those of the public training code (internvl/model/internvl_chat and internlm2); no
released file was read. Its class vector and the first position belong to a token that the model cuts off
again: they are not read, and written as zeros or not at all. The positions of released files fit tiles of 448
pixels.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.backbones import INTERNLM2, decoder, plain_config, text_changes
from neo_jax.convert.table import Family, Row

VISION = "vision_model.embeddings."


def matches(hf: Mapping[str, Any]) -> bool:
    llm = hf.get("llm_config")
    return isinstance(llm, Mapping) and llm.get("architectures") == ["InternLM2VEForCausalLM"]


def canonical(name: str) -> str | None:
    return None if name == VISION + "class_embedding" else name


def table(model: ConfigDict) -> Iterator[Row]:
    yield from tile_embedding(model, VISION)
    C, D = model.embed.hidden_size * model.embed.merge_size**2, model.hidden_size
    for part in ("weight", "bias"):
        yield Row(f"mlp1.0.{part}", (C,), "copy", (f"patch_embed/norm/{part}",))
    yield from projector("mlp1", (1, 3), C, D)
    yield from decoder(
        model,
        prefix="language_model.",
        names=INTERNLM2,
        visual=lambda name: name.replace("feed_forward.", "feed_forward_ve."),
    )


def tile_embedding(model: ConfigDict, prefix: str) -> Iterator[Row]:
    """Convolution and positions of a tile."""
    C, p = model.embed.hidden_size, model.embed.patch_size
    places = (model.embed.tile_size // p) ** 2
    yield Row(prefix + "patch_embedding.weight", (C, 3, p, p), "conv", ("patch_embed/patch/weight",))
    yield Row(prefix + "patch_embedding.bias", (C,), "copy", ("patch_embed/patch/bias",))
    shape = (1, 1 + places, C)
    yield Row(prefix + "position_embedding", shape, "after_class", ("patch_embed/positions",))


def projector(name: str, numbers: tuple[int, int], C: int, D: int) -> Iterator[Row]:
    """The two matrices between patches and stream, at places `numbers` of an nn.Sequential."""
    for number, part, inputs in zip(numbers, ("up", "out"), (C, D), strict=True):
        weight, bias = f"patch_embed/{part}/weight", f"patch_embed/{part}/bias"
        yield Row(f"{name}.{number}.weight", (D, inputs), "linear", (weight,))
        yield Row(f"{name}.{number}.bias", (D,), "copy", (bias,))


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    vision = fields.section(hf, "vision_config")
    size = fields.read(vision, "image_size", int)
    return language_changes(hf) | {
        "pre_buffer": 0,
        "embed.norm": True,
        "embed.patch_size": fields.read(vision, "patch_size", int),
        "embed.merge_size": round(1 / fields.read(hf, "downsample_ratio", float)),
        "embed.hidden_size": fields.read(vision, "hidden_size", int),
        "embed.tile_size": fields.read(hf, "force_image_size", int, size),
        "route.mlp": "modality",
    }


def language_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What HoVLE shares: InternLM2 over tiles.

    Its "dynamic" rotary scaling changes nothing up to max_position_embeddings, and is passed over.
    """
    llm = dict(fields.section(hf, "llm_config"))
    if (llm.get("rope_scaling") or {}).get("type") == "dynamic":
        del llm["rope_scaling"]
    return text_changes(llm) | {
        "mlp": "swiglu",
        "norm": "rms",
        "qk_norm": "none",
        "attention_bias": tuple("qkvo" if fields.read(llm, "bias", bool, False) else ""),
        "tie_embeddings": bool(fields.tied(llm, hf)),
        "mask": "causal",
        "sliding_window": 0,
        "embed.kind": "unshuffle_mlp",
        "coords.kind": "1d",
    }


def chat_config(model: ConfigDict, special: Mapping[str, int], max_pixels: int) -> dict[str, Any]:
    """What HoVLE shares of a config.json."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "dtype": "float32",
        "img_context_token_id": special["<IMG_CONTEXT>"],
        "downsample_ratio": 1 / model.embed.merge_size,
        "force_image_size": model.embed.tile_size,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": max(1, max_pixels // model.embed.tile_size**2),
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "tie_word_embeddings": model.tie_embeddings,
    }


def hf_config(
    model: ConfigDict, special: Mapping[str, int], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """The config.json of a Mono-InternVL checkpoint; `special` has the id of <IMG_CONTEXT>."""
    return chat_config(model, special, max_pixels) | {
        "vision_config": {
            "architectures": ["InternVisionPatchModel"],
            "model_type": "intern_vit_patch",
            "hidden_size": model.embed.hidden_size,
            "image_size": model.embed.tile_size,
            "patch_size": model.embed.patch_size,
            "num_channels": 3,
        },
        "llm_config": plain_config("internlm2", "InternLM2VEForCausalLM", model),
    }


def pixels(hf: Mapping[str, Any]) -> tuple[int, int]:
    """One tile to as many as the config allows; a thumbnail comes on top."""
    tile = fields.read(hf, "force_image_size", int, 448) ** 2
    return tile, tile * fields.read(hf, "max_dynamic_patch", int, 6)


DATA = {"layout": "internvl", "resize": "internvl", "template": "internlm2"}
MONO_INTERNVL = Family(matches, model_changes, table, hf_config, canonical, DATA, pixels)
