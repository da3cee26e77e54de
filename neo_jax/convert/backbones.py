"""Text decoders: the layers that every family's table contains, and the plain language models themselves.

`decoder(model, prefix, names)` derives all rows of a decoder from our model config: biases, query/key norms,
H and W projections, LayerNorms and modality copies are there exactly if the model has them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from neo_jax.convert import fields
from neo_jax.convert.table import Family, Row
from neo_jax.errors import UserError
from neo_jax.model.coords import COORDS


class Names(NamedTuple):
    """HF names of a decoder's modules, without ".weight"; inside a layer they follow `layer`."""

    token_embed: str = "model.embed_tokens"
    layer: str = "model.layers.{}."
    norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""  # one fused matrix, grouped by key/value head, in place of q, k and v
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


LLAMA = Names()  # also Qwen and Mistral
INTERNLM2 = Names(
    token_embed="model.tok_embeddings",
    head="output",
    attention_norm="attention_norm",
    qkv="attention.wqkv",
    o="attention.wo",
    mlp_norm="ffn_norm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
)
PERSIMMON = Names(
    norm="model.final_layernorm",
    qkv="self_attn.query_key_value",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    o="self_attn.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def decoder(
    model: ConfigDict,
    prefix: str = "",
    names: Names = LLAMA,
    visual: Callable[[str], str] | None = None,
) -> Iterator[Row]:
    """All rows of a text decoder: word embeddings, layers, final norm, head.

    Args:
        prefix: in front of every HF name.
        visual: for models with modality routing, HF name inside a layer (with ".weight" or ".bias") -> that
            of the visual copy.
    """
    D, V = model.hidden_size, model.vocab_size
    yield Row(f"{prefix}{names.token_embed}.weight", (V, D), "copy", ("token_embed",))
    layer_rows = list(_layer(model, names, visual))
    for number in range(model.num_layers):
        stack, index = (
            ("pre_buffer", number) if number < model.pre_buffer else ("layers", number - model.pre_buffer)
        )
        for row in layer_rows:
            name = prefix + names.layer.format(number) + row.name
            yield Row(name, row.shape, row.kind, tuple(f"{stack}/{path}" for path in row.paths), index)
    for row in _norm(model.norm, "norm", names.norm, D):
        yield row._replace(name=prefix + row.name)
    if not model.tie_embeddings:
        yield Row(f"{prefix}{names.head}.weight", (V, D), "linear", ("head",))


def _layer(model: ConfigDict, names: Names, visual: Callable[[str], str] | None) -> Iterator[Row]:
    """Rows of one layer, names and paths inside it."""
    if model.route.mlp == "topk":
        raise UserError(
            "model.route.mlp: 'topk' has no place in Hugging Face's layout: no family has learned experts"
        )
    D, N, d = model.hidden_size, model.num_heads, model.head_dim
    modules = (
        ("attention_norm", "norm", list(_norm(model.norm, "", names.attention_norm, D))),
        ("attention/qkv", "attention", list(_qkv(model, names))),
        ("attention/o", "attention", list(_matrix("", names.o, D, N * d, "o" in model.attention_bias))),
        ("mlp_norm", "norm", list(_norm(model.norm, "", names.mlp_norm, D))),
        ("mlp", "mlp", list(_mlp(model, names))),
    )
    for module, switch, rows in modules:
        routed = model.route[switch] == "modality"
        for row in rows:
            place = f"{module}/text" if routed else module
            yield row._replace(paths=tuple(f"{place}/{path}" for path in row.paths))
        if routed:
            assert visual is not None, (
                f"model.route.{switch} is modality, but the family names no visual copies"
            )
            for row in rows:
                paths = tuple(f"{module}/visual/{path}" for path in row.paths)
                yield row._replace(name=visual(row.name), paths=paths)


def _qkv(model: ConfigDict, names: Names) -> Iterator[Row]:
    D, N, K, d = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim
    biased = model.attention_bias
    if names.qkv:
        outputs = (N + 2 * K) * d
        yield Row(f"{names.qkv}.weight", (outputs, D), "grouped_qkv", ("q/weight", "k/weight", "v/weight"))
        if biased:
            yield Row(f"{names.qkv}.bias", (outputs,), "grouped_qkv", ("q/bias", "k/bias", "v/bias"))
    else:
        for side, name, heads in (("q", names.q, N), ("k", names.k, K), ("v", names.v, K)):
            yield from _matrix(side, name, heads * d, D, side in biased)
    coords = COORDS[model.coords.kind](model.coords, d)
    if coords.hw_norms:
        for side, name, heads in (("q", names.q, N), ("k", names.k, K)):
            yield from _matrix(f"{side}_hw", f"{name}_hw", heads * d, D, side in biased)
    for suffix, size in coords.norms + coords.hw_norms if model.qk_norm != "none" else ():
        for side, name in (("q", names.q_norm), ("k", names.k_norm)):
            yield from _norm(model.qk_norm, f"{side}_norm{suffix}", name + suffix, size)


def _mlp(model: ConfigDict, names: Names) -> Iterator[Row]:
    D, F = model.hidden_size, model.mlp_size
    if model.mlp == "swiglu":
        yield from _matrix("gate", names.gate, F, D, model.mlp_bias)
    yield from _matrix("up", names.up, F, D, model.mlp_bias)
    yield from _matrix("down", names.down, D, F, model.mlp_bias)


def _matrix(path: str, name: str, outputs: int, inputs: int, bias: bool) -> Iterator[Row]:
    inside = f"{path}/" if path else ""
    yield Row(f"{name}.weight", (outputs, inputs), "linear", (f"{inside}weight",))
    if bias:
        yield Row(f"{name}.bias", (outputs,), "copy", (f"{inside}bias",))


def _norm(kind: str, path: str, name: str, size: int) -> Iterator[Row]:
    inside = f"{path}/" if path else ""
    yield Row(f"{name}.weight", (size,), "copy", (f"{inside}weight",))
    if kind == "layer":
        yield Row(f"{name}.bias", (size,), "copy", (f"{inside}bias",))


def text_changes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of configs/base.py model() that the sizes in a decoder's config.json decide.

    They are the same keys in every family that descends from Llama. Ties are left to the caller.
    """
    heads, D = fields.read(hf, "num_attention_heads", int), fields.read(hf, "hidden_size", int)
    activation = fields.read(hf, "hidden_act", str, "silu")
    if activation != "silu":
        raise UserError(f"config.json: hidden_act {activation!r} is not supported here, only 'silu'")
    return {
        "vocab_size": fields.read(hf, "vocab_size", int),
        "hidden_size": D,
        "num_layers": fields.read(hf, "num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": fields.read(hf, "num_key_value_heads", int, heads),
        "head_dim": fields.read(hf, "head_dim", int, D // heads),
        "mlp_size": fields.read(hf, "intermediate_size", int),
        "norm_eps": fields.read(hf, "rms_norm_eps", float, 1e-6),
        "coords.rope_theta": fields.rope_theta(hf),
    }


def _plain(hf: Mapping[str, Any], qk_norm: str, attention_bias: str, window: int) -> dict[str, Any]:
    """model() fields of a plain language model."""
    return text_changes(hf) | {
        "pre_buffer": 0,
        "mlp": "swiglu",
        "mlp_bias": fields.read(hf, "mlp_bias", bool, False),
        "norm": "rms",
        "qk_norm": qk_norm,
        "attention_bias": tuple(attention_bias),
        "tie_embeddings": bool(fields.tied(hf)),
        "mask": "causal",
        "sliding_window": window,
        "embed.kind": "none",
        "coords.kind": "1d",
    }


def qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _plain(
        hf, "rms", "qkvo" if fields.read(hf, "attention_bias", bool, False) else "", _qwen_window(hf)
    )


def qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen2 and Qwen2.5."""
    return _plain(hf, "none", "qkv", _qwen_window(hf))


def mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _plain(hf, "none", "", _before_itself(fields.read(hf, "sliding_window", int, 0)))


def llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _plain(hf, "none", "qkvo" if fields.read(hf, "attention_bias", bool, False) else "", 0)


def internlm2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _plain(hf, "none", "qkvo" if fields.read(hf, "bias", bool, False) else "", 0)


def _qwen_window(hf: Mapping[str, Any]) -> int:
    """Qwen's layers from max_window_layers on slide, if any do."""
    if not fields.read(hf, "use_sliding_window", bool, False):
        return 0
    full = fields.read(hf, "max_window_layers", int, 0)
    if full >= fields.read(hf, "num_hidden_layers", int):
        return 0
    if full:
        raise UserError(
            "config.json: use_sliding_window for a part of the layers (max_window_layers) is not supported"
        )
    return _before_itself(fields.read(hf, "sliding_window", int, 0))


def _before_itself(window: int) -> int:
    """`transformers` counts the query's own key into the window, config.model.sliding_window does not."""
    if window == 1:
        raise UserError("config.json: a sliding_window of 1 key is not supported")
    return window - 1 if window else 0


def plain_config(model_type: str, architecture: str, model: ConfigDict) -> dict[str, Any]:
    """The config.json of a plain language model."""
    hf = {
        "architectures": [architecture],
        "model_type": model_type,
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
        "max_position_embeddings": 32768,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if model_type == "internlm2":
        return hf | {"bias": bool(model.attention_bias)}
    hf |= {"sliding_window": model.sliding_window + 1 if model.sliding_window else None}
    if model_type.startswith("qwen"):
        hf |= {"use_sliding_window": bool(model.sliding_window), "max_window_layers": 0}
    if model_type in ("qwen3", "llama"):
        hf |= {"attention_bias": bool(model.attention_bias)}
    return hf | ({"mlp_bias": model.mlp_bias} if model_type == "llama" else {})


def _family(
    model_type: str,
    architecture: str,
    model_changes: Callable[[Mapping[str, Any]], dict[str, Any]],
    names: Names = LLAMA,
) -> Family:
    return Family(
        matches=lambda hf: hf.get("model_type") == model_type,
        model_changes=model_changes,
        table=lambda model: decoder(model, names=names),
        hf_config=lambda model, *_: plain_config(model_type, architecture, model),
    )


BACKBONES = {
    "qwen3": _family("qwen3", "Qwen3ForCausalLM", qwen3),
    "qwen2": _family("qwen2", "Qwen2ForCausalLM", qwen2),
    "mistral": _family("mistral", "MistralForCausalLM", mistral),
    "llama": _family("llama", "LlamaForCausalLM", llama),
    "internlm2": _family("internlm2", "InternLM2ForCausalLM", internlm2, INTERNLM2),
}
