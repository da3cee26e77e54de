"""Recordings of original implementations as batches of ours: what went in, laid out as our data layer would.

A recording is a folder with `config.json`, `weights.safetensors` under the original's names, and cases,
`case*.safetensors`; tests/golden has one per family, each with a README. NEO's config.json is its model's.
The others' say what was recorded, and `describe` makes of it the config.json that the model would have had.
Everything is read from the files: no size and no id is written down here.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import schema
from data_pipelines.layout import CLASS_SLOT, ROW_SLOT
from neo_jax.convert import evev2, fields, files
from neo_jax.errors import UserError

Arrays = Mapping[str, np.ndarray]
Batch = dict[str, np.ndarray]
Grid = tuple[np.ndarray, np.ndarray]  # an image: squares [p, 3 * side^2] uint8, rows and columns [p, 2]

IGNORED = -100  # label of a position that is not predicted
IMAGE_KINDS = (schema.PATCH, schema.SLOT, schema.SEPARATOR)
# EVE shows so many patches per side of an image whose mask is empty, in a sample without one (specs 2.3).
EVE_EMPTY = 16
# EVEv2: what the end of a case's name says of its model, in all else that of config.json.
EVEV2_VARIANTS: dict[str, dict[str, Any]] = {
    "shared_norms": {"moe_part": "self_attn-mlp"},
    "dense_stage0": {"add_moe": False},
}


class Description(NamedTuple):
    """What a recording's config.json says of the model of one of its cases."""

    family: str  # key of FAMILIES
    hf: dict[str, Any]  # the model's config.json
    changes: dict[str, Any]  # dotted fields of configs/base.py model() that no config.json of the family has
    holds: Callable[[str], bool] = lambda name: True  # tensors of weights.safetensors that the model has


def describe(recorded: Mapping[str, Any], case: str) -> Description | None:
    """The model of a case, by the case's name without suffix. None: the config.json is itself a model's."""
    for mark, make in _DESCRIPTIONS.items():
        if mark in recorded:
            return make(recorded, case)
    return None


def _solo(recorded: Mapping[str, Any], case: str) -> Description:
    # The config's window is wider than any row; the case that shows one was run with another.
    window = {"sliding_window": recorded["sliding_window_for_eager_case"]} if "sliding_window" in case else {}
    return Description("solo", recorded["config"] | window, _norm(recorded["image_norm"], ""))


def _fuyu(recorded: Mapping[str, Any], case: str) -> Description:
    return Description("fuyu", recorded["config"], {})


def _eve(recorded: Mapping[str, Any], case: str) -> Description:
    dims = recorded["dims"]
    hf = recorded["llama"] | {
        "architectures": ["EVELlamaForCausalLM"],
        "vocab_size": dims["vocab"],
        "hidden_size": dims["hidden"],
        "intermediate_size": dims["inter"],
        "num_hidden_layers": dims["layers"],
        "num_attention_heads": dims["heads"],
        "mm_hidden_size": dims["mm"],
        "patch_stride": dims["patch"],
        "conv_stride": dims["conv"],
    }
    return Description("eve", hf, _norm(recorded))


def _evev2(recorded: Mapping[str, Any], case: str) -> Description:
    dims, processor = recorded["dims"], recorded["preprocessor"]
    hf = recorded["qwen2"] | {
        "model_type": "eve-qwen2",
        "architectures": ["EVEQwen2ForCausalLM"],
        "vocab_size": dims["vocab"],
        "hidden_size": dims["hidden"],
        "intermediate_size": dims["inter"],
        "num_hidden_layers": dims["layers"],
        "num_attention_heads": dims["heads"],
        "num_key_value_heads": dims["kv"],
        "mm_hidden_size": dims["mm"],
        "patch_stride": processor["patch_stride"],
        "dense_stride": processor["dense_stride"],
        "add_moe": recorded["add_moe"],
        "moe_part": recorded["moe_part"],
    }
    for variant, changes in EVEV2_VARIANTS.items():
        hf |= changes if case.endswith(variant) else {}
    # One file holds the weights of all cases; a variant with fewer parts knows fewer of them.
    copied = [module for part in evev2.routed_parts(hf) for module in evev2.COPIED[part]]
    return Description(
        "evev2",
        hf,
        _norm(processor),
        lambda name: "moe_" not in name or any(f"moe_{module}" in name for module in copied),
    )


def _norm(recorded: Mapping[str, Any], prefix: str = "image_") -> dict[str, Any]:
    return {f"embed.pixel_{name}": tuple(recorded[prefix + name]) for name in ("mean", "std")}


# A field that only one family's recorded config.json has -> its description.
_DESCRIPTIONS: dict[str, Callable[[Mapping[str, Any], str], Description]] = {
    "special_token_ids": _solo,
    "image_newline_id": _fuyu,
    "llama": _eve,
    "qwen2": _evev2,
}


def inputs(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a case; one that repeats another's inputs is completed from that one.

    EVEv2's variants have the name of the case whose images they share, and more behind it.
    """
    tensors = {name: tensor.read() for name, tensor in files.read_header(path).items()}
    others = path.parent.glob("case*.safetensors")
    shorter = [other for other in others if path.stem.startswith(f"{other.stem}_")]
    if family_of(tensors) is None and shorter:
        base = inputs(max(shorter, key=lambda other: len(other.stem)))
        return {name: x for name, x in base.items() if name.startswith("in.")} | tensors
    return tensors


# --- batches: (tensors of the case, the recording's config.json, our config of its model) -> a batch


def neo(case: Arrays, hf: Mapping[str, Any], model: ConfigDict) -> Batch:
    """One packed row, [1, ...], out of what NEO's collator makes."""
    tokens, bounds, embed = case["input_ids"], case["seq_boundaries"], model.embed
    is_patch = tokens == fields.read(hf, "img_context_token_id", int)
    image_number = np.cumsum(tokens == fields.read(hf, "img_start_token_id", int))
    p, m = embed.patch_size, embed.merge_size
    rows = np.split(case["pixel_values"], np.cumsum(case["grid_hw"].prod(1))[:-1])
    grids = []
    for (height, width), patches in zip(case["grid_hw"], rows, strict=True):
        image = patches.reshape(height, width, 3, p, p).transpose(0, 3, 1, 4, 2)
        image = uint8_pixels(image.reshape(height * p, width * p, 3), embed)
        grids.append(cut(image, p * m))
    segment_ids = (np.arange(len(tokens))[:, None] >= bounds).sum(axis=1)
    weights: np.ndarray = np.append(case["loss_weight"][1:], 0).astype(np.float32)
    thw = np.stack([case["t_index"], case["h_index"], case["w_index"]], -1)
    table = token_table(
        tokens[None],
        np.where(is_patch, schema.PATCH, schema.TEXT)[None],
        [grids],
        case["labels"][None],
        segment_ids=segment_ids[None],
        image_ids=np.where(is_patch, image_number, 0)[None],
        coords=thw[None],
    )
    return table | {"loss_weights": weights[None]}


def solo(case: Arrays, recorded: Mapping[str, Any], model: ConfigDict) -> Batch:
    ids, tokens, index = recorded["special_token_ids"], case["in.input_ids"], case["in.vision_patch_indices"]
    order = recorded["image_norm"]["patch_flatten_order"]
    squares = uint8_pixels(
        rows_to_squares(case["in.vision_patches"], model.embed.patch_size, order), model.embed
    )
    kinds = np.full(tokens.shape, schema.TEXT)
    kinds[index >= 0], kinds[tokens == ids["vrow_sep"]] = schema.PATCH, schema.SEPARATOR
    if ((index >= 0) != (tokens == ids["vpatch"])).any():
        raise UserError("in.vision_patch_indices and in.input_ids name different patches")
    positions, segment_ids = case.get("in.position_ids"), case["in.attention_mask"]
    if positions is not None:  # packed documents: positions restart at each
        segment_ids = np.cumsum(positions == 0, axis=1)
    return token_table(
        tokens,
        kinds,
        [_plain(squares[row[row >= 0]]) for row in index],
        case["in.labels"],
        segment_ids=segment_ids,
        positions=positions,
    )


def fuyu(case: Arrays, recorded: Mapping[str, Any], model: ConfigDict) -> Batch:
    tokens, embed = case["in.input_ids"], model.embed
    kinds = np.full(tokens.shape, schema.TEXT)
    kinds[tokens == recorded["image_token_id"]] = schema.PATCH
    kinds[tokens == recorded["image_newline_id"]] = schema.SEPARATOR
    squares = [rows_to_squares(rows, embed.patch_size, "H,W,C") for rows in fuyu_patches(case)]
    images = [_plain(uint8_pixels(x, embed)) for x in squares]
    return token_table(tokens, kinds, images, case["in.labels"], segment_ids=case["in.attention_mask"])


def fuyu_patches(case: Arrays) -> list[np.ndarray]:
    """Normalised patches of each row of the batch, [p, 3 * side^2]: one tensor, or one per sample."""
    if "in.image_patches" in case:
        return list(case["in.image_patches"])
    count = sum(name.startswith("in.image_patches.") for name in case)
    return [case[f"in.image_patches.{row}"][0] for row in range(count)]


def eve(case: Arrays, recorded: Mapping[str, Any], model: ConfigDict) -> Batch:
    return expanded(case, eve_images(case, model), recorded["image_token_index"])


def eve_images(case: Arrays, model: ConfigDict) -> list[Grid]:
    """The images of in.images, without what pads them to a square."""
    side = model.embed.patch_size * model.embed.merge_size
    bands = [eve_band(image, model) for image in case["in.images"]]
    shown = [
        image[:3, *band].transpose(1, 2, 0) for image, band in zip(case["in.images"], bands, strict=True)
    ]
    return [cut(uint8_pixels(image, model.embed), side) for image in shown]


def eve_band(image: np.ndarray, model: ConfigDict) -> tuple[slice, slice]:
    """The rows and columns of an image [4, S, S] that its mask, the last channel, shows."""
    places = np.argwhere(image[3] > 0)
    if not len(places):
        size = min(EVE_EMPTY * model.embed.patch_size, image.shape[1])
        return slice(0, size), slice(0, size)
    (top, left), (bottom, right) = places.min(0), places.max(0) + 1
    if not (image[3, top:bottom, left:right] == 1).all():
        raise UserError("the mask of an image is no rectangle")
    return slice(top, bottom), slice(left, right)


def evev2_batch(case: Arrays, recorded: Mapping[str, Any], model: ConfigDict) -> Batch:
    return expanded(case, evev2_images(case, model), recorded["image_token_index"])


def evev2_images(case: Arrays, model: ConfigDict) -> list[Grid]:
    side = model.embed.patch_size * model.embed.merge_size
    count = sum(name.startswith("in.image.") for name in case)
    images = [case[f"in.image.{i}"].transpose(1, 2, 0) for i in range(count)]
    return [cut(uint8_pixels(image, model.embed), side) for image in images]


# Family -> a tensor that only its cases have; -> the batch.
BATCHES: dict[str, tuple[str, Callable[[Arrays, Mapping[str, Any], ConfigDict], Batch]]] = {
    "neo": ("seq_boundaries", neo),
    "solo": ("in.vision_patch_indices", solo),
    "fuyu": ("in.image_patches", fuyu),
    "eve": ("in.images", eve),
    "evev2": ("in.image.0", evev2_batch),
}


def family_of(case: Arrays) -> str | None:
    """The family that a case's tensors are of, None for none."""
    for family, (mark, _) in BATCHES.items():
        if any(name == mark or name.startswith(f"{mark}.") for name in case):
            return family
    return None


def hidden_states(case: Arrays) -> list[np.ndarray]:
    """The recorded stream [B, L, D]: embeddings, after each layer but the last, after the final norm.

    NEO's recordings have the last layer too, which the final norm follows here as well.
    """
    neo = sorted(name for name in case if name.startswith("hidden_states.") and name[14].isdigit())
    if neo:
        return [case[name][None] for name in (*neo[:-1], "hidden_states.final_norm")]
    count = sum(name.startswith("out.hidden.") for name in case)
    return [case[f"out.hidden.{i}"] for i in range(count)]


# --- parts


def uint8_pixels(normalised: np.ndarray, embed: ConfigDict) -> np.ndarray:
    """Undoes the pixel norm of a model's embed config on [..., 3].

    Raises:
        UserError: a pixel was no whole number of 0..255.
    """
    std, mean = np.asarray(embed.pixel_std, np.float64), np.asarray(embed.pixel_mean, np.float64)
    pixels = (normalised.astype(np.float64) * std + mean) * 255
    whole = np.rint(pixels)
    if np.abs(pixels - whole).max() > 1e-3 or whole.min() < 0 or whole.max() > 255:
        raise UserError("normalised pixels are no whole numbers of 0..255 before: of another norm?")
    return whole.astype(np.uint8)


def cut(image: np.ndarray, side: int) -> Grid:
    """An image [H, W, 3] as squares (y, x, rgb), with their rows and columns."""
    h, w = image.shape[0] // side, image.shape[1] // side
    squares = image.reshape(h, side, w, side, 3).swapaxes(1, 2).reshape(h * w, -1)
    return squares, np.indices((h, w)).reshape(2, -1).T


def _plain(squares: np.ndarray) -> list[Grid]:
    """Squares [p, side, side, 3] whose places nothing reads."""
    return [(squares.reshape(len(squares), -1), np.zeros((len(squares), 2), int))]


def rows_to_squares(rows: np.ndarray, side: int, order: str) -> np.ndarray:
    """Flattened patches [p, 3 * side^2], "C,H,W" or "H,W,C" -> [p, side, side, 3]."""
    if order == "C,H,W":
        return rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    if order == "H,W,C":
        return rows.reshape(-1, side, side, 3)
    raise UserError(f"patches are flattened in an unknown order {order!r}")


def span(grid: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Tokens and kinds of an image in EVE and EVEv2: class vector, then every row with a marker after it."""
    h, w = grid
    tokens = [CLASS_SLOT, *([0] * w + [ROW_SLOT]) * h]
    return tokens, [schema.SLOT, *([schema.PATCH] * w + [schema.SLOT]) * h]


def expanded(case: Arrays, images: Iterable[Grid], placeholder: int) -> Batch:
    """The batch of an EVE or EVEv2 case: `placeholder` in in.input_ids becomes an image's tokens.

    A sample without a placeholder owns an image that it does not show.
    """
    ids, mask, labels = (case[f"in.{name}"] for name in ("input_ids", "attention_mask", "labels"))
    remaining: Iterator[Grid] = iter(images)
    rows: list[dict[str, list]] = []
    for own, real, own_labels in zip(ids, mask > 0, labels, strict=True):
        row: dict[str, list] = {"tokens": [], "kinds": [], "labels": [], "images": [], "of": []}
        if placeholder not in own:
            next(remaining)
        for token, label in zip(own[real], own_labels[real], strict=True):
            if token == placeholder:
                row["images"].append(next(remaining))
                tokens, kinds = span(row["images"][-1][1][-1] + 1)
                row["of"] += [len(row["images"])] * len(tokens)
            else:
                tokens, kinds = [token], [schema.TEXT]
                row["of"].append(0)
            row["tokens"] += tokens
            row["kinds"] += kinds
            row["labels"] += [label] if token != placeholder else [IGNORED] * len(tokens)
        rows.append(row)
    if next(remaining, None) is not None:
        raise UserError("an image belongs to no sample")
    length = max(len(row["tokens"]) for row in rows)

    def padded(name: str, fill: int) -> np.ndarray:
        return np.array([row[name] + [fill] * (length - len(row[name])) for row in rows])

    all_kinds = padded("kinds", schema.PAD)
    return token_table(
        padded("tokens", 0),
        all_kinds,
        [row["images"] for row in rows],
        padded("labels", IGNORED),
        segment_ids=np.where(all_kinds == schema.PAD, 0, 1),
        image_ids=padded("of", 0),
    )


def token_table(
    tokens: np.ndarray,
    kinds: np.ndarray,
    images: Sequence[Sequence[Grid]],
    labels: np.ndarray,
    *,
    segment_ids: np.ndarray,
    positions: np.ndarray | None = None,
    image_ids: np.ndarray | None = None,
    coords: np.ndarray | None = None,
) -> Batch:
    """A batch (DESIGN section 3).

    Args:
        tokens, kinds: [B, L].
        images: those of each row in order; rows may have different numbers of patches.
        labels: [B, L], the label of each position's own token, IGNORED where it is not predicted.
        segment_ids: [B, L], document numbers, 0 = padding.
        positions: [B, L], t of each token; its index where None.
        image_ids: [B, L]; every run of image tokens is one where None.
        coords: [B, L, 3]; 1-D ones of `positions` where None.

    Raises:
        UserError: a target belongs to another document, or image tokens and patches differ in number.
    """
    B, L = tokens.shape
    kinds = np.where(segment_ids > 0, kinds, schema.PAD)
    shifted = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    predicts = shifted != IGNORED
    if (segment_ids != np.pad(segment_ids[:, 1:], ((0, 0), (0, 1))))[predicts].any():
        raise UserError("a target belongs to another document")
    is_patch = kinds == schema.PATCH
    counts = [sum(len(squares) for squares, _ in row) for row in images]
    if (is_patch.sum(axis=1) != counts).any():
        raise UserError(f"rows have {is_patch.sum(axis=1).tolist()} image tokens, but {counts} patches")
    dim = max(squares.shape[-1] for row in images for squares, _ in row)
    patches: np.ndarray = np.zeros((B, max(counts), dim), np.uint8)
    places: np.ndarray = np.zeros((B, max(counts), 2), np.int32)
    for b, row in enumerate(images):
        if row:
            patches[b, : counts[b]] = np.concatenate([squares for squares, _ in row])
            places[b, : counts[b]] = np.concatenate([where for _, where in row])
    if coords is None:
        t = np.broadcast_to(np.arange(L), (B, L)) if positions is None else positions
        coords = np.stack([t, np.zeros_like(t), np.zeros_like(t)], axis=-1)
    table = {
        "tokens": tokens,
        "kinds": kinds,
        "segment_ids": segment_ids,
        "image_ids": _runs(kinds) if image_ids is None else image_ids,
        "targets": np.where(predicts, shifted, 0),
        "patch_index": np.where(is_patch, np.cumsum(is_patch, axis=1) - 1, -1),
        "source_ids": np.zeros((B, L)),
    }
    batch = {name: x.astype(np.int32) for name, x in table.items()}
    floats = {"coords": coords, "loss_weights": predicts}
    return (
        batch
        | {name: x.astype(np.float32) for name, x in floats.items()}
        | {"patches": patches, "patch_hw": places}
    )


def _runs(kinds: np.ndarray) -> np.ndarray:
    """Image numbers [B, L] of rows whose images are separated by text: each run of image tokens is one."""
    of_image = np.isin(kinds, IMAGE_KINDS)
    starts = of_image & ~np.pad(of_image, ((0, 0), (1, 0)))[:, :-1]
    return np.where(of_image, np.cumsum(starts, axis=1), 0)
