"""Fuyu checkpoints (specs: solo_eve_evev2_fuyu.md section 4): a Persimmon decoder over linear patches.

Written with the names that transformers gives since 4.52, so that its FuyuForCausalLM loads them; the older
prefixes of the published checkpoint are read too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.backbones import PERSIMMON, decoder
from neo_jax.convert.table import Family, Row
from neo_jax.errors import UserError

NAMES = PERSIMMON._replace(
    token_embed="model.language_model.embed_tokens",
    layer="model.language_model.layers.{}.",
    norm="model.language_model.final_layernorm",
)
OLDER_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_embed_tokens.": "model.vision_embed_tokens.",
}
ROPE_THETA, ROTARY_FRACTION = 25000.0, 0.5  # where a config.json is silent
MAX_HW = (1080, 1920)  # larger images shrink to fit into it
PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)


def matches(hf: Mapping[str, Any]) -> bool:
    return hf.get("model_type") == "fuyu"


def canonical(name: str) -> str:
    """The name that transformers gives a tensor today."""
    for older, current in OLDER_PREFIXES.items():
        if name.startswith(older):
            return current + name.removeprefix(older)
    return name


def table(model: ConfigDict) -> Iterator[Row]:
    D, patch = model.hidden_size, "model.vision_embed_tokens."
    pixels = 3 * model.embed.patch_size**2
    yield Row(patch + "weight", (D, pixels), "linear", ("patch_embed/project/weight",))
    yield Row(patch + "bias", (D,), "copy", ("patch_embed/project/bias",))
    yield from decoder(model, names=NAMES)


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's fields stand in `text_config`; in the published file beside the others."""
    text = fields.section(hf, "text_config") if hf.get("text_config") else hf
    rope = text.get("rope_parameters") or text
    heads, D = fields.read(text, "num_attention_heads", int), fields.read(text, "hidden_size", int)
    activation = fields.read(text, "hidden_act", str, "relu2")
    if activation != "relu2":
        raise UserError(f"config.json: hidden_act {activation!r} is not supported here, only 'relu2'")
    return {
        "vocab_size": fields.read(text, "vocab_size", int),
        "hidden_size": D,
        "num_layers": fields.read(text, "num_hidden_layers", int),
        "pre_buffer": 0,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": D // heads,
        "mlp_size": fields.read(text, "intermediate_size", int),
        "mlp": "relu2",
        "mlp_bias": True,
        "norm": "layer",
        "norm_eps": fields.read(text, "layer_norm_eps", float, 1e-5),
        "qk_norm": "layer" if fields.read(text, "qk_layernorm", bool, True) else "none",
        "attention_bias": ("q", "k", "v", "o"),
        "tie_embeddings": bool(fields.tied(text, hf)),
        "mask": "causal",
        "embed.kind": "linear_patch",
        "embed.patch_size": fields.read(hf, "patch_size", int, 30),
        "embed.merge_size": 1,
        "embed.bias": True,
        "embed.merge": "replace",
        "embed.pixel_mean": PIXEL_MEAN,
        "embed.pixel_std": PIXEL_STD,
        "coords.kind": "1d",
        "coords.rope_theta": fields.rope_theta({"rope_theta": ROPE_THETA, **text}),
        "coords.rotary_fraction": fields.read(rope, "partial_rotary_factor", float, ROTARY_FRACTION),
    }


def hf_config(
    model: ConfigDict, special: Mapping[str, int], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """The config.json of a Fuyu checkpoint; `special` has the id of |SPEAKER|, which patches replace."""
    text = {
        "model_type": "persimmon",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "hidden_act": "relu2",
        "layer_norm_eps": model.norm_eps,
        "qk_layernorm": model.qk_norm == "layer",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.coords.rope_theta,
            "partial_rotary_factor": model.coords.rotary_fraction,
        },
        "max_position_embeddings": 16384,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }
    return {
        "architectures": ["FuyuForCausalLM"],
        "model_type": "fuyu",
        "dtype": "float32",
        "image_token_id": special["|SPEAKER|"],
        "patch_size": model.embed.patch_size,
        "num_channels": 3,
        "tie_word_embeddings": model.tie_embeddings,
        "text_config": text,
    }


def processor_files(model: ConfigDict, max_hw: tuple[int, int] = MAX_HW) -> dict[str, dict[str, Any]]:
    """File name -> content of what transformers' FuyuProcessor reads beside the tokenizer.

    `max_hw` is the largest (height, width) of an image, to which larger ones shrink. The tokenizer has to be
    of Fuyu's form: "\u2581" begins every text, and |SPEAKER| and |NEWLINE| are pieces of its model, not added
    tokens, because the processor drops the first token of every image as that sign.
    """
    side = {"height": model.embed.patch_size, "width": model.embed.patch_size}
    image = {
        "image_processor_type": "FuyuImageProcessor",
        "patch_size": side,
        "size": {"height": max_hw[0], "width": max_hw[1]},
        "image_mean": model.embed.pixel_mean[0],
        "image_std": model.embed.pixel_std[0],
        "padding_value": 1.0,
    }
    return {
        "preprocessor_config.json": image | {"processor_class": "FuyuProcessor"},
        "processor_config.json": {"processor_class": "FuyuProcessor"},
    }


FUYU = Family(
    matches,
    model_changes,
    table,
    hf_config,
    canonical,
    data={"layout": "fuyu", "resize": "fuyu", "template": "fuyu"},
    pixels=lambda hf: (1, MAX_HW[0] * MAX_HW[1]),  # images are shrunk, never enlarged
    processor_files=processor_files,
)
