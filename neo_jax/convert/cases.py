"""Recorded cases: what went into an original implementation, and the logits that came out.

A case file is a safetensors file of one of two forms:

    token table   the fields of a batch (DESIGN: tokens, kinds, ...; [B, ...]) and `logits` [B, L, V]
    NEO           what the original's collator makes (input_ids, pixel_values, ...) and `logits` [L, V]
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import schema
from neo_jax.convert import fields, files
from neo_jax.errors import UserError

Arrays = Mapping[str, np.ndarray]
TABLE = ("tokens", "kinds", "segment_ids", "image_ids", "coords", "patch_index", "patches", "patch_hw")
NEO = ("input_ids", "seq_boundaries", "t_index", "h_index", "w_index", "grid_hw", "pixel_values")


class Case(NamedTuple):
    """A batch of ours and what the original says about it."""

    batch: dict[str, np.ndarray]
    logits: np.ndarray  # [B, L, V]; anything at padding


def load(path: pathlib.Path, hf: Mapping[str, Any], model: ConfigDict) -> Case:
    """Reads a case; `hf` is the config.json of its model, `model` our config of it.

    Raises:
        UserError: it is of neither form, or of another model.
    """
    tensors = {name: tensor.read() for name, tensor in files.read_header(path).items()}
    if missing := {"logits"} - set(tensors):
        raise UserError(f"--case={path}: has no {', '.join(missing)} to compare with")
    if set(TABLE) <= set(tensors):
        case = Case({name: tensors[name] for name in TABLE}, tensors["logits"])
    elif set(NEO) <= set(tensors):
        case = Case(neo_batch(tensors, hf, model), tensors["logits"][None])
    else:
        raise UserError(
            f"--case={path}: neither a token table ({', '.join(TABLE)}) nor a recording of NEO "
            f"({', '.join(NEO)})"
        )
    wanted = (*case.batch["tokens"].shape, model.vocab_size)
    if case.logits.shape != wanted:
        raise UserError(f"--case={path}: logits have shape {case.logits.shape}, not {wanted}")
    return case


def neo_batch(case: Arrays, hf: Mapping[str, Any], model: ConfigDict) -> dict[str, np.ndarray]:
    """One packed row, [1, ...], out of what NEO's collator makes; pixels are the uint8 they were before."""
    tokens, bounds, embed = case["input_ids"], case["seq_boundaries"], model.embed
    is_patch = tokens == fields.read(hf, "img_context_token_id", int)
    image_number = np.cumsum(tokens == fields.read(hf, "img_start_token_id", int))
    p, m = embed.patch_size, embed.merge_size
    squares, places = [], []
    images = np.split(case["pixel_values"], np.cumsum(case["grid_hw"].prod(1))[:-1])
    for (height, width), image in zip(case["grid_hw"], images, strict=True):
        pixels = image.reshape(height, width, 3, p, p).transpose(0, 3, 1, 4, 2).reshape(-1, width * p, 3)
        pixels = np.rint((pixels * embed.pixel_std + np.asarray(embed.pixel_mean)) * 255).astype(np.uint8)
        grid = height // m, width // m
        cut = pixels.reshape(grid[0], m * p, grid[1], m * p, 3).swapaxes(1, 2)
        squares.append(cut.reshape(-1, (m * p) ** 2 * 3))
        places.append(np.indices(grid).reshape(2, -1).T)
    table = {
        "tokens": tokens,
        "kinds": np.where(is_patch, schema.PATCH, schema.TEXT),
        "segment_ids": np.searchsorted(bounds, np.arange(len(tokens)), side="right"),
        "image_ids": np.where(is_patch, image_number, 0),
        "coords": np.stack([case["t_index"], case["h_index"], case["w_index"]], -1).astype(np.float32),
        "patch_index": np.where(is_patch, np.cumsum(is_patch) - 1, -1),
        "patches": np.concatenate(squares),
        "patch_hw": np.concatenate(places),
    }
    return {name: x[None].astype(np.int32 if x.dtype == np.int64 else x.dtype) for name, x in table.items()}
