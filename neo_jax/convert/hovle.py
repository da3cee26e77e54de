"""HoVLE checkpoints (specs: methods.md 1.4): eight layers of InternLM2's kind in front of InternLM2.

Names are those of the index of the released files, and shapes those of its modelling code; with eight layers
and 448-pixel tiles they add up to the index's 10,425,311,232 bytes. The key "embedding_config" of config.json
and the number of layers could not be read, only derived. Two tensors of the files are read by nothing once
the model is trained: the language model's own word embeddings, which the first stage distils, and the class
vector.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.backbones import INTERNLM2, decoder, plain_config
from neo_jax.convert.mono_internvl import (
    DATA,
    chat_config,
    language_changes,
    pixels,
    projector,
    tile_embedding,
)
from neo_jax.convert.table import Family, Row
from neo_jax.errors import UserError

EMBEDDING, LANGUAGE = "embedding_model.", "language_model."
VISION = EMBEDDING + "vision_embeddings."
UNREAD = (LANGUAGE + "model.tok_embeddings.weight", VISION + "class_embedding")
_NAMES = INTERNLM2._replace(
    token_embed=EMBEDDING + "llm_text_embeddings", norm=LANGUAGE + "model.norm", head=LANGUAGE + "output"
)


def matches(hf: Mapping[str, Any]) -> bool:
    return isinstance(hf.get("embedding_config"), Mapping)


def canonical(name: str) -> str | None:
    return None if name in UNREAD else name


def table(model: ConfigDict) -> Iterator[Row]:
    yield from tile_embedding(model, VISION)
    C, D = model.embed.hidden_size * model.embed.merge_size**2, model.hidden_size
    yield from projector(EMBEDDING + "pixel_shuffle_proj", (0, 2), C, D)
    for row in decoder(model, names=_NAMES):
        yield row._replace(name=_renumbered(row.name, model.pre_buffer))


def _renumbered(name: str, pre_buffer: int) -> str:
    """Layers have one name before InternLM2 and another in it, each counted from 0."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    number, rest = int(match[1]), match[2]
    if number < pre_buffer:
        return f"{EMBEDDING}encoder.{number}.{rest}"
    return f"{LANGUAGE}model.layers.{number - pre_buffer}.{rest}"


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError where its layers are not shaped as the language model's, which one block serves."""
    embedding, llm = fields.section(hf, "embedding_config"), fields.section(hf, "llm_config")
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        ours, theirs = fields.read(embedding, key, int), fields.read(llm, key, int)
        if ours != theirs:
            raise UserError(f"config.json: embedding_config has {key} {ours}, llm_config has {theirs}")
    if fields.read(embedding, "use_ls", bool, False):
        raise UserError("config.json: embedding_config.use_ls: scaled layers are not supported")
    changes = language_changes(hf)
    layers = fields.read(embedding, "num_hidden_layers", int)
    return changes | {
        "num_layers": changes["num_layers"] + layers,
        "pre_buffer": layers,
        "embed.norm": False,
        "embed.patch_size": fields.read(embedding, "patch_size", int),
        "embed.merge_size": round(1 / fields.read(embedding, "downsample_ratio", float, 0.5)),
        "embed.hidden_size": fields.read(embedding, "hidden_size", int),
        "embed.tile_size": fields.read(embedding, "image_size", int),
        "route.mlp": "shared",
    }


def hf_config(
    model: ConfigDict, special: Mapping[str, int], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """The config.json of a HoVLE checkpoint; `special` has the id of <IMG_CONTEXT>."""
    llm = plain_config("internlm2", "InternLM2ForCausalLM", model)
    llm["num_hidden_layers"] = model.num_layers - model.pre_buffer
    return chat_config(model, special, max_pixels) | {
        "embedding_config": {
            "model_type": "holistic_embedding",
            "hidden_size": model.hidden_size,
            "intermediate_size": model.mlp_size,
            "num_hidden_layers": model.pre_buffer,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "attention_bias": bool(model.attention_bias),
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.coords.rope_theta,
            "image_size": model.embed.tile_size,
            "patch_size": model.embed.patch_size,
            "downsample_ratio": 1 / model.embed.merge_size,
            "use_pixel_shuffle_proj": True,
            "pixel_shuffle_loc": "pre",
            "use_ls": False,
            "llm_vocab_size": model.vocab_size,
            "llm_hidden_size": model.hidden_size,
            "img_context_token_id": special["<IMG_CONTEXT>"],
        },
        "llm_config": llm,
    }


HOVLE = Family(matches, model_changes, table, hf_config, canonical, DATA, pixels)
