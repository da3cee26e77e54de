"""Recordings of the original implementations (tests/golden/FAMILY) as batches of our model.

A recording's arrays are laid out by its README; here they become the token table that our data layer would
have made. Everything is read from the recording's files: no size, id or tolerance is written down in a test.
"""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from data_pipelines import schema
from tests import golden_files

IGNORED = -100  # label of a position that is not predicted, in every recording
IMAGE_KINDS = (schema.PATCH, schema.SLOT, schema.SEPARATOR)


def cases(family: str) -> list[Path]:
    """The recorded cases of a family; fails on an empty folder, which would make its tests vacuous."""
    folder = golden_files.ROOT / family
    found = sorted(folder.glob("case*.safetensors"))
    if not found:
        raise FileNotFoundError(f"no recordings in {folder}")
    return found


@functools.cache
def tolerance_groups(folder: Path) -> dict[str, float]:
    """Group of tensors -> the worst float32 error of the original against itself in float64."""
    groups: dict[str, float] = {}
    for tensors in json.loads((folder / "tolerance.json").read_text()).values():
        for name, errors in tensors.items():
            groups[_group(name)] = max(groups.get(_group(name), 0.0), errors["max_abs_diff"])
    return groups


def tolerance(folder: Path, name: str) -> float:
    """What the READMEs suggest: 20 times the error of the tensor's group, 50 times for gradients."""
    return (50 if name.startswith("grad") else 20) * tolerance_groups(folder)[_group(name)]


def _group(name: str) -> str:
    """ "out.hidden.3" -> "out.hidden", "out.layer0.q" -> "out.layer", "grad.lm_head.weight" -> "grad"."""
    first, _, rest = name.partition(".")
    return first if first.startswith("grad") else f"{first}.{re.match('[a-z_]+', rest)[0]}"


def close(actual, expected, atol: float) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual.reshape(expected.shape), expected, rtol=0, atol=atol)


def uint8_pixels(normalised: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undoes (x / 255 - mean) / std on [..., 3]; fails where a pixel was no whole number of 0..255."""
    pixels = (normalised.astype(np.float64) * std + np.asarray(mean, np.float64)) * 255
    whole = np.rint(pixels)
    np.testing.assert_allclose(pixels, whole, rtol=0, atol=1e-3)
    assert whole.min() >= 0 and whole.max() <= 255
    return whole.astype(np.uint8)


def runs(kinds: np.ndarray) -> np.ndarray:
    """Image numbers [B, L] of a row whose images are separated by text: each run of image tokens is one."""
    of_image = np.isin(kinds, IMAGE_KINDS)
    starts = of_image & ~np.pad(of_image, ((0, 0), (1, 0)))[:, :-1]
    return np.where(of_image, np.cumsum(starts, axis=1), 0)


def token_table(
    tokens: np.ndarray,
    kinds: np.ndarray,
    squares: Sequence[np.ndarray],
    labels: np.ndarray,
    segment_ids: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    image_ids: np.ndarray | None = None,
    patch_hw: Sequence[np.ndarray] | None = None,
) -> dict[str, jnp.ndarray]:
    """A batch (DESIGN section 3) with 1-D coordinates.

    Args:
        tokens, kinds: [B, L].
        squares: for each row its image tokens in order, uint8 [p, X], (y, x, rgb); p may differ.
        labels: [B, L], the label of each position's own token, IGNORED where it is not predicted.
        segment_ids: [B, L], document numbers, 0 = padding; all 1 where None.
        positions: [B, L], t of each token; its index where None.
        image_ids: [B, L]; `runs` where None.
        patch_hw: for each row [p, 2]; zeros where None, for embeds that do not read it.
    """
    B, L = tokens.shape
    segment_ids = np.ones((B, L), int) if segment_ids is None else segment_ids
    kinds = np.where(segment_ids > 0, kinds, schema.PAD)
    shifted = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    predicts = shifted != IGNORED
    next_segment = np.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    assert (segment_ids == next_segment)[predicts].all(), "a target belongs to another document"
    is_patch = kinds == schema.PATCH
    P = max(len(row) for row in squares)
    patches = np.zeros((B, P, max(row.shape[-1] for row in squares)), np.uint8)
    places = np.zeros((B, P, 2), np.int32)
    for b, row in enumerate(squares):
        assert len(row) == is_patch[b].sum(), "image tokens and patches differ in number"
        if len(row):
            patches[b, : len(row)] = row
        if patch_hw is not None:
            places[b, : len(row)] = patch_hw[b]
    t = np.broadcast_to(np.arange(L), (B, L)) if positions is None else positions
    coords = np.stack([t, np.zeros_like(t), np.zeros_like(t)], axis=-1)
    table = {
        "tokens": tokens,
        "kinds": kinds,
        "segment_ids": segment_ids,
        "image_ids": runs(kinds) if image_ids is None else image_ids,
        "coords": coords.astype(np.float32),
        "targets": np.where(predicts, shifted, 0),
        "loss_weights": predicts.astype(np.float32),
        "patch_index": np.where(is_patch, np.cumsum(is_patch, axis=1) - 1, -1),
        "patches": patches,
        "patch_hw": places,
    }
    cast = {np.dtype(np.int64): np.int32}
    return {name: jnp.asarray(x.astype(cast.get(x.dtype, x.dtype))) for name, x in table.items()}


def rows_to_squares(rows: np.ndarray, side: int, order: str) -> np.ndarray:
    """Flattened patches [p, 3 * side^2], "chw" or "hwc" -> [p, side, side, 3]."""
    if order == "chw":
        return rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    return rows.reshape(-1, side, side, 3)


def prompt(batch: dict[str, jnp.ndarray], length: int) -> dict[str, jnp.ndarray]:
    """The first `length` positions of every row; all patches stay."""
    return {name: x if name in ("patches", "patch_hw") else x[:, :length] for name, x in batch.items()}
