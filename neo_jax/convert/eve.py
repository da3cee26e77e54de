"""EVE v1 checkpoints (EVELlamaForCausalLM; specs: solo_eve_evev2_fuyu.md section 2.7).

The patch aligning layer, `model.vision_tower_compressor.*`, is in checkpoints of training only; it is our
objective distill (`heads`). It takes no part in what the model computes, so an import leaves it out unless
its config trains with it (`--config=configs/eve_7b.py:aligned`). The frozen CLIP teacher, stored twice beside
it, is no part of the model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.backbones import decoder, plain_config, text_changes
from neo_jax.convert.table import Family, Row

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
COMPRESSOR = "model.vision_tower_compressor."


def matches(hf: Mapping[str, Any]) -> bool:
    return "EVELlamaForCausalLM" in (hf.get("architectures") or ()) and hf.get("model_type") != "eve-llama3"


def canonical(name: str) -> str | None:
    """Leaves out the teacher and the patch aligning layer."""
    return None if "clip" in name or name.startswith(COMPRESSOR) else name


def table(model: ConfigDict) -> Iterator[Row]:
    D, C, p = model.hidden_size, model.embed.hidden_size, model.embed.patch_size
    tower, projector = "model.vision_tower.", "model.mm_projector."
    yield Row(tower + "patch_embedding.weight", (C, 3, p, p), "conv", ("patch_embed/patch/weight",))
    yield Row(tower + "class_embedding", (C,), "copy", ("patch_embed/class_vector",))
    yield Row(tower + "split_embedding", (C,), "copy", ("patch_embed/row_vector",))
    for name, path in (("local_attention", "local"), ("global_attention", "over_image")):
        yield from _attention(f"{tower}{name}.", f"patch_embed/{path}", C)
    yield from _linear(projector + "0", "patch_embed/up", D, C)
    yield from _linear(projector + "2", "patch_embed/out", D, D)
    yield from decoder(model)


def _attention(name: str, path: str, size: int) -> Iterator[Row]:
    """One attention of the patch embedding: norm and matrix of queries, of keys and values; output."""
    for hf, ours in (("q.0", "q_norm"), ("kv.0", "kv_norm")):
        yield Row(f"{name}{hf}.weight", (size,), "copy", (f"{path}/{ours}/weight",))
        yield Row(f"{name}{hf}.bias", (size,), "copy", (f"{path}/{ours}/bias",))
    yield Row(f"{name}q.1.weight", (size, size), "linear", (f"{path}/q/weight",))
    yield Row(f"{name}kv.1.weight", (2 * size, size), "below", (f"{path}/k/weight", f"{path}/v/weight"))
    yield from _linear(f"{name}proj", f"{path}/o", size, size)


def _linear(name: str, path: str, outputs: int, inputs: int) -> Iterator[Row]:
    yield Row(f"{name}.weight", (outputs, inputs), "linear", (f"{path}/weight",))
    yield Row(f"{name}.bias", (outputs,), "copy", (f"{path}/bias",))


def heads(config: ConfigDict) -> Iterator[Row]:
    """The patch aligning layer of a whole config: the parameters of the objective distill."""
    D, C = config.model.hidden_size, config.objectives.distill.teacher_size
    num_taps = config.model.num_layers // config.objectives.distill.every + 1
    for tap in range(num_taps):
        name, path = f"{COMPRESSOR}norm_layer.{tap}.", "objectives/distill/taps"
        yield Row(f"{name}0.weight", (D,), "copy", (f"{path}/norm/weight",), tap)
        yield Row(f"{name}0.bias", (D,), "copy", (f"{path}/norm/bias",), tap)
        yield Row(f"{name}1.weight", (C, D), "linear", (f"{path}/project/weight",), tap)
    yield from _linear(f"{COMPRESSOR}input_layer", "objectives/distill/last", C, D)
    yield from _linear(f"{COMPRESSOR}output_layer", "objectives/distill/fused", C, C)


def model_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Released configs name a processor folder that exists nowhere: its settings are the defaults here."""
    return text_changes(hf) | {
        "pre_buffer": 0,
        "mlp": "swiglu",
        "norm": "rms",
        "qk_norm": "none",
        "attention_bias": (),
        "tie_embeddings": bool(fields.tied(hf)),
        "mask": "causal",
        "embed.kind": "local_attention",
        "embed.patch_size": fields.read(hf, "patch_stride", int, 14),
        "embed.merge_size": fields.read(hf, "conv_stride", int, 2),
        "embed.hidden_size": fields.read(hf, "mm_hidden_size", int),
        "embed.pixel_mean": CLIP_MEAN,
        "embed.pixel_std": CLIP_STD,
        "coords.kind": "1d",
    }


def hf_config(
    model: ConfigDict, special: Mapping[str, int], min_pixels: int, max_pixels: int
) -> dict[str, Any]:
    """The config.json; an image is square there, of at most max_pixels."""
    return plain_config("llama", "EVELlamaForCausalLM", model) | {
        "model_type": "eve",
        "mm_hidden_size": model.embed.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "requires_cliploss": False,
        "image_size": round(max_pixels**0.5),
        "patch_stride": model.embed.patch_size,
        "conv_stride": model.embed.merge_size,
    }


def pixels(hf: Mapping[str, Any]) -> tuple[int, int]:
    """Images fill a square in one dimension; 672 pixels, or 1344 for EVE-HD."""
    side = fields.read(hf, "image_size", int, 672)
    return (fields.read(hf, "patch_stride", int, 14) * fields.read(hf, "conv_stride", int, 2)) ** 2, side**2


EVE = Family(
    matches,
    model_changes,
    table,
    hf_config,
    canonical,
    data={"layout": "eve", "resize": "eve", "template": "vicuna"},
    pixels=pixels,
    heads=heads,
)
