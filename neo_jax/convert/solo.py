"""SOLO checkpoints (specs: solo_eve_evev2_fuyu.md section 1): Mistral's names and one matrix for patches.

A SOLO config.json is Mistral's with a `vision_patch_size`; the original class even says model_type "mistral".
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.backbones import decoder, text_changes
from neo_jax.convert.table import Family, Row


def matches(hf: Mapping[str, Any]) -> bool:
    return "vision_patch_size" in hf


def table(model: ConfigDict) -> Iterator[Row]:
    shape = (model.hidden_size, 3 * model.embed.patch_size**2)
    yield Row("model.embed_vision_patch.weight", shape, "linear_chw", ("patch_embed/project/weight",))
    yield from decoder(model)


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    return text_changes(hf) | {
        "pre_buffer": 0,
        "mlp": "swiglu",
        "norm": "rms",
        "qk_norm": "none",
        "tie_embeddings": bool(fields.tied(hf)),
        "mask": "causal",
        # Window w shows w + 1 keys, in training (flash attention) as in the recorded reference (specs 1.5).
        "sliding_window": fields.read(hf, "sliding_window", int, 0),
        "embed.kind": "linear_patch",
        "embed.patch_size": fields.read(hf, "vision_patch_size", int),
        "embed.merge_size": 1,
        "embed.merge": "add",
        "coords.kind": "1d",
    }


def hf_config(
    model: ConfigDict, special: Mapping[str, int], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """The config.json of a SOLO checkpoint; `special` has the ids of <vpatch> and <vrow_sep>."""
    return {
        "architectures": ["SoloForCausalLM"],
        "model_type": "solo",
        "dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.coords.rope_theta,
        "sliding_window": model.sliding_window or None,
        "max_position_embeddings": 32768,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "vision_patch_size": model.embed.patch_size,
        "vpatch_token_id": special["<vpatch>"],
        "vrow_sep_token_id": special["<vrow_sep>"],
    }


SOLO = Family(
    matches,
    model_changes,
    table,
    hf_config,
    data={"layout": "solo_sft", "resize": "solo", "template": "solo_sft"},
)
