"""What the values of a config must be: kinds that exist, numbers in range, fields that fit each other.

`neo_jax.config.resolve` calls this once names and types are right. A new kind of model part is added to
`CHOICES`, a new constraint to the function of its section.
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from data_pipelines.documents import resize_from_config
from data_pipelines.errors import DataError
from data_pipelines.forms import FORMS
from data_pipelines.layout import LAYOUTS
from data_pipelines.mix import ALL, TRAIN, Mixture
from data_pipelines.overlong import POLICIES
from data_pipelines.resize import RESIZES
from data_pipelines.sources import SOURCES
from data_pipelines.template import TEMPLATES
from neo_jax.errors import UserError

# Fields that name a kind, and the kinds there are. "*" stands for any stage.
CHOICES: dict[str, tuple[str, ...]] = {
    "family": (
        *("neo", "solo", "eve", "evev2", "fuyu", "mono_internvl", "hovle", "breen"),
        *("qwen3", "qwen2", "mistral", "llama", "internlm2"),
    ),
    "model.dtype": ("float32", "bfloat16"),
    "model.reduce_dtype": ("float32", "bfloat16"),
    "model.quantization": ("none", "int8", "fp8"),
    "model.remat_policy": ("none", "full", "dots", "offload"),
    "model.attention": ("auto", "reference", "xla_chunked", "splash", "triton", "cudnn", "mosaic"),
    "model.mask": ("causal", "image_bidirectional", "prefix"),
    "model.mlp": ("swiglu", "relu2"),
    "model.norm": ("rms", "layer"),
    "model.qk_norm": ("none", "rms", "layer"),
    "model.embed.kind": ("none", "conv_gelu_conv", "linear_patch", "local_attention", "unshuffle_mlp"),
    "model.embed.merge": ("replace", "add"),
    "model.coords.kind": ("1d", "v2pe", "mrope", "thw", "thw_split"),
    "model.route.attention": ("shared", "modality"),
    "model.route.mlp": ("shared", "modality", "topk"),
    "model.route.norm": ("shared", "modality"),
    "data.template": tuple(TEMPLATES),
    "data.layout": tuple(LAYOUTS),
    "data.resize": tuple(RESIZES),
    "data.overlong": tuple(POLICIES),
    "data.sources.*.kind": tuple(SOURCES),
    "data.sources.*.form": tuple(FORMS),
    "data.sources.*.template": ("", *TEMPLATES),
    "stage.*.template": ("", *TEMPLATES),
    "stage.*.layout": ("", *LAYOUTS),
    "stage.*.loss_reduction": ("token", "sample", "square"),
    "stage.*.schedule": ("cosine", "linear", "wsd"),
}

# Numbers are positive unless listed here: field -> (what the value must be, test).
_Range = tuple[str, Callable[[float], bool]]
_POSITIVE: _Range = ("positive", lambda value: value > 0)
_NOT_NEGATIVE: _Range = ("at least 0", lambda value: value >= 0)
_FRACTION: _Range = ("between 0 and 1", lambda value: 0 <= value <= 1)
_DECAY: _Range = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_RANGES: dict[str, _Range] = {
    "seed": ("between 0 and 2**31 - 1", lambda value: 0 <= value < 2**31),
    "model.pre_buffer": _NOT_NEGATIVE,
    "model.sliding_window": _NOT_NEGATIVE,
    "model.embed.pixel_mean": _NOT_NEGATIVE,
    "model.embed.slots": _NOT_NEGATIVE,
    "model.coords.sections": _NOT_NEGATIVE,
    "model.coords.rotary_fraction": _FRACTION,
    "model.coords.delta": _FRACTION,
    "model.route.visual_share": _DECAY,
    "data.prefetch": _NOT_NEGATIVE,
    "data.workers": _NOT_NEGATIVE,
    "data.max_rejected": _FRACTION,
    "data.sources.*.max_rejected": _FRACTION,
    "train.eval_every": _NOT_NEGATIVE,
    "train.keep_steps": _NOT_NEGATIVE,
    "eval.num_generate": _NOT_NEGATIVE,
    "stage.*.mixture.*": _NOT_NEGATIVE,
    "stage.*.objectives.*": _NOT_NEGATIVE,
    "stage.*.min_lr_ratio": _FRACTION,
    "stage.*.cooldown_share": _FRACTION,
    "stage.*.tags_share": _FRACTION,
    "stage.*.parallel_share": _FRACTION,
    "stage.*.warmup_steps": _NOT_NEGATIVE,
    "stage.*.b1": _DECAY,
    "stage.*.b2": _DECAY,
    "stage.*.weight_decay": _NOT_NEGATIVE,
}

OBJECTIVES = ("ntp", "distill", "balance")  # what a stage may minimise
_MAY_BE_EMPTY = {"data.recipe", "data.special_tokens", "data.tokenizer", "data.quarantine"}
_MAY_BE_EMPTY |= {
    f"data.sources.*.{name}" for name in ("template", "image_fields", "text_fields", "image_root")
}
_MAY_BE_EMPTY |= {"init", "branch", "train.local_folder", "eval.splits", "model.attention_bias"}
_MAY_BE_EMPTY |= {"stage.*.template", "stage.*.layout"}
_MIN_CAPTION_TOKENS = 16  # a row that cannot hold one image and this much text is a mistake


def check_field(field: str, value: Any) -> None:
    """Checks one field by itself; `field` is its dotted name. Raises UserError."""
    pattern = re.sub(r"^stage\.\w+\.", "stage.*.", field)
    pattern = re.sub(r"^stage\.\*\.(mixture|objectives)\..*", r"stage.*.\1.*", pattern)
    pattern = re.sub(r"^data\.sources\.\w+\.", "data.sources.*.", pattern)
    if isinstance(value, (str, tuple)):
        _check(bool(value) or pattern in _MAY_BE_EMPTY, f"{field}: must not be empty")
    if pattern in CHOICES:
        kinds = ", ".join(CHOICES[pattern])
        _check(value in CHOICES[pattern], f"{field}: {value!r} is not a kind; choose from {kinds}")
    for number in _flat(value):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            wanted, test = _RANGES.get(pattern, _POSITIVE)
            _check(math.isfinite(number) and test(number), f"{field}: must be {wanted}, got {value!r}")


def _flat(value: Any) -> list[Any]:
    """The value, or the elements of a tuple and of the tuples in it."""
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, tuple) else [value]


def check_together(config: FrozenConfigDict) -> None:
    """Checks that the fields of a whole config fit each other. Raises UserError for the first that do not."""
    _check_model(config.model, config.data)
    _check_mesh(config.mesh)
    _check(
        not config.train.local_folder or config.mesh.data > 1,
        "train.local_folder: needs mesh.data of at least 2, as the first copy of the weights has no "
        "checkpoints in memory; leave it empty",
    )
    _check(
        not len(config.data.sources) or bool(config.data.tokenizer),
        "data.tokenizer: data.sources need one; name a tokenizer.json",
    )
    _check_stages(config)
    for name in config.stage:
        _check_stage(config, name)


def _check_model(model: FrozenConfigDict, data: FrozenConfigDict) -> None:
    _check(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_kv_heads: {model.num_kv_heads} does not divide model.num_heads = {model.num_heads}",
    )
    _check(
        model.pre_buffer <= model.num_layers,
        f"model.pre_buffer: {model.pre_buffer} layers are more than model.num_layers = {model.num_layers}",
    )
    _check(
        model.reduce_dtype in ("float32", model.dtype),
        f"model.reduce_dtype: {model.reduce_dtype!r} is neither 'float32' nor model.dtype = {model.dtype!r}",
    )
    for projection in model.attention_bias:
        _check(projection in "qkvo", f"model.attention_bias: {projection!r} is none of q, k, v, o")
    _check_coords(model)
    _check_embed(model.embed)
    if model.route.mlp == "topk":
        _check_experts(model)
    appended = f" and {len(data.special_tokens)} data.special_tokens" if data.special_tokens else ""
    _check(
        model.vocab_size >= data.vocab_size + len(data.special_tokens),
        f"model.vocab_size: {model.vocab_size} is less than data.vocab_size = {data.vocab_size}{appended}",
    )


def _check_coords(model: FrozenConfigDict) -> None:
    coords = model.coords
    # thw rotates head_dim / 2 channels by h and by w, thw_split head_dim / 4, both in pairs.
    multiple = {"thw": 4, "thw_split": 8}.get(coords.kind, 2)
    _check(
        model.head_dim % multiple == 0,
        f"model.head_dim: {model.head_dim} is not divisible by {multiple}, for coords.kind {coords.kind!r}",
    )
    rotated = model.head_dim * coords.rotary_fraction
    _check(
        rotated == round(rotated) and round(rotated) % 2 == 0 and rotated > 0,
        f"model.coords.rotary_fraction: {coords.rotary_fraction} of head_dim = {model.head_dim} channels is "
        "not an even number",
    )
    _check(
        coords.kind != "mrope" or (len(coords.sections) == 3 and 2 * sum(coords.sections) == model.head_dim),
        f"model.coords.sections: {coords.sections} are not three numbers whose sum is model.head_dim / 2 = "
        f"{model.head_dim // 2}",
    )


def _check_embed(embed: FrozenConfigDict) -> None:
    multiple = {"conv_gelu_conv": 4 if embed.rotate else 1, "local_attention": 8}.get(embed.kind, 1)
    _check(
        embed.hidden_size % multiple == 0,
        f"model.embed.hidden_size: {embed.hidden_size} is not divisible by {multiple}, as embed.kind "
        f"{embed.kind!r} needs",
    )
    side = embed.patch_size * embed.merge_size
    _check(
        embed.kind != "unshuffle_mlp" or embed.tile_size % side == 0,
        f"model.embed.tile_size: {embed.tile_size} is not divisible by patch_size * merge_size = {side}",
    )
    _check(
        not embed.slots or embed.kind in ("conv_gelu_conv", "linear_patch"),
        f"model.embed.slots: embed.kind {embed.kind!r} has no learned slots to set; leave 0",
    )
    for name in ("pixel_mean", "pixel_std"):
        _check(len(embed[name]) == 3, f"model.embed.{name}: expected 3 values (RGB), got {embed[name]}")


def _check_experts(model: FrozenConfigDict) -> None:
    num, per_token = model.experts.num, model.experts.per_token
    _check(
        per_token < num,
        f"model.experts.per_token: {per_token} of model.experts.num = {num} leaves nothing to choose",
    )
    _check(
        model.mlp_size % per_token == 0,
        f"model.mlp_size: {model.mlp_size} is not divisible by model.experts.per_token = {per_token}, the "
        "experts that share it",
    )
    for field, only in (("quantization", "none"), ("mlp_bias", False)):
        _check(
            model[field] == only,
            f"model.{field}: {model[field]!r} is not supported by model.route.mlp 'topk', only {only!r}",
        )


def _check_mesh(mesh: FrozenConfigDict) -> None:
    axes = {axis: size for axis, size in mesh.items() if not axis.startswith("num_")}
    _check(
        math.prod(axes.values()) == mesh.num_devices,
        f"mesh.num_devices: {mesh.num_devices} is not the product of "
        f"{', '.join(f'mesh.{axis} = {size}' for axis, size in axes.items())}",
    )
    _check(
        mesh.data % mesh.num_slices == 0,
        f"mesh.data: {mesh.data} is not divisible by mesh.num_slices = {mesh.num_slices}, over which it is "
        "split",
    )


def _check_stages(config: FrozenConfigDict) -> None:
    for name in config.stages:
        if name not in config.stage:
            _check(len(config.stage) > 0, f"stages: no stage {name!r}; config.stage is empty")
            raise UserError(f"stages: no stage {name!r}; did you mean {nearest(name, list(config.stage))}?")
    _check(len(set(config.stages)) == len(config.stages), f"stages: {config.stages} names a stage twice")


def _check_stage(config: FrozenConfigDict, name: str) -> None:
    stage, mesh, embed = config.stage[name], config.mesh, config.model.embed
    here = f"stage.{name}"
    token_side = embed.patch_size * embed.merge_size
    image_tokens = resize_from_config(config, stage).most_tokens
    shards = mesh.data * mesh.fsdp

    for pattern in stage.trainable:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{here}.trainable: {pattern!r} is not a regular expression: {error}") from error
    _check_mixture(config.data, stage.mixture, here)
    for objective in stage.objectives:
        _check(
            objective in OBJECTIVES,
            f"{here}.objectives: {objective!r} is not a kind; choose from {', '.join(OBJECTIVES)}",
        )
    _check(sum(stage.objectives.values()) > 0, f"{here}.objectives: needs one with a positive weight")
    if stage.objectives.get("distill", 0.0):
        _check_distill(config)
    _check(
        not stage.objectives.get("balance", 0.0) or config.model.route.mlp == "topk",
        f"{here}.objectives.balance: there is nothing to balance unless model.route.mlp is 'topk'",
    )
    _check(
        stage.batch_size % stage.accumulate == 0,
        f"{here}.batch_size: {stage.batch_size} is not divisible by {here}.accumulate = {stage.accumulate}",
    )
    _check(
        stage.batch_size % (stage.accumulate * shards) == 0,
        f"{here}.batch_size: {stage.batch_size} is not divisible by "
        f"{here}.accumulate * mesh.data * mesh.fsdp = {stage.accumulate * shards}",
    )
    for field in ("row_tokens", "row_patches"):
        _check(
            stage[field] % mesh.context == 0,
            f"{here}.{field}: {stage[field]} is not divisible by mesh.context = {mesh.context}",
        )
    _check(
        stage.min_pixels <= stage.max_pixels,
        f"{here}.min_pixels: {stage.min_pixels} is more than {here}.max_pixels = {stage.max_pixels}",
    )
    _check(
        image_tokens >= 1,
        f"{here}.max_pixels: {stage.max_pixels} is less than one image token: "
        f"(model.embed.patch_size * model.embed.merge_size)**2 = {token_side**2}",
    )
    _check(
        stage.row_patches >= image_tokens,
        f"{here}.row_patches: {stage.row_patches} is less than the {image_tokens} tokens of one image of "
        f"{here}.max_pixels = {stage.max_pixels}",
    )
    # 2: the markers before and after an image.
    shortest = image_tokens + 2 + _MIN_CAPTION_TOKENS
    _check(
        stage.row_tokens >= shortest,
        f"{here}.row_tokens: {stage.row_tokens} is less than {shortest}: one image of {image_tokens} tokens "
        f"({here}.max_pixels = {stage.max_pixels}), its two markers and a caption of {_MIN_CAPTION_TOKENS}",
    )
    _check(
        stage.warmup_steps <= stage.steps,
        f"{here}.warmup_steps: {stage.warmup_steps} is more than {here}.steps = {stage.steps}",
    )


def _check_distill(config: FrozenConfigDict) -> None:
    head, num_layers = config.objectives.distill, config.model.num_layers
    _check(
        head.teacher_size % 8 == 0,
        f"objectives.distill.teacher_size: {head.teacher_size} is not divisible by 8, its attention heads",
    )
    _check(
        head.every <= num_layers,
        f"objectives.distill.every: {head.every} is more than model.num_layers = {num_layers}; the tap "
        "of the last layer needs others to attend to",
    )


def _check_mixture(data: FrozenConfigDict, mixture: FrozenConfigDict, here: str) -> None:
    """Names are sources of `data.sources`, if it has any, and at every step one of them has a weight."""
    known = [name for name, source in data.sources.items() if source.split == TRAIN]
    for name in mixture:
        _check(
            not len(data.sources) or name in (ALL, *known),
            f"{here}.mixture.{name}: no source of split {TRAIN!r}; "
            f"did you mean {nearest(name, [ALL, *known])}?",
        )
    try:
        weights = Mixture(dict(mixture))
        steps = [pair[0] for weight in mixture.values() if isinstance(weight, tuple) for pair in weight]
        for step in (0, *steps):
            weights.at(step)
    except DataError as error:
        raise UserError(f"{here}.{error}") from error


def nearest(name: str, candidates: Sequence[str]) -> str:
    """The candidate most like `name`: the last part of a dotted name counts as much as the whole."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    return max(candidates, key=likeness)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
