"""Recorded samples of EVE and EVEv2 as batches: a placeholder in the text becomes an image's tokens."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from data_pipelines import schema
from neo_jax.model.local_attention import CLASS, ROW
from tests.neo_jax import recordings


def cut(image: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image [H, W, 3] as squares [p, 3 * side^2], (y, x, rgb), and their rows and columns [p, 2]."""
    h, w = image.shape[0] // side, image.shape[1] // side
    squares = image.reshape(h, side, w, side, 3).swapaxes(1, 2).reshape(h * w, -1)
    return squares, np.indices((h, w)).reshape(2, -1).T


def span(grid: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Tokens and kinds of an image in EVE and EVEv2: class vector, then every row with a marker after it."""
    h, w = grid
    tokens = [CLASS, *([0] * w + [ROW]) * h]
    return tokens, [schema.SLOT, *([schema.PATCH] * w + [schema.SLOT]) * h]


def table(
    case: dict[str, np.ndarray], images: Sequence[tuple[np.ndarray, np.ndarray]], placeholder: int
) -> dict[str, jnp.ndarray]:
    """The batch of an EVE or EVEv2 case.

    Args:
        case: in.input_ids and in.labels with `placeholder` where an image goes, in.attention_mask.
        images: what `cut` gives for each; a sample without a placeholder owns one that it does not show.
    """
    remaining = iter(images)
    rows = []
    inputs = (case[f"in.{name}"] for name in ("input_ids", "attention_mask", "labels"))
    for ids, mask, labels in zip(*inputs, strict=True):
        row: dict[str, list] = {"tokens": [], "kinds": [], "labels": [], "images": []}
        if placeholder not in ids:
            next(remaining)
        for token, label in zip(ids[mask > 0], labels[mask > 0], strict=True):
            tokens, kinds = [token], [schema.TEXT]
            if token == placeholder:
                row["images"].append(next(remaining))
                tokens, kinds = span(row["images"][-1][1][-1] + 1)
            row["tokens"] += tokens
            row["kinds"] += kinds
            row["labels"] += [label] if token != placeholder else [recordings.IGNORED] * len(tokens)
        rows.append(row)
    assert next(remaining, None) is None, "an image belongs to no sample"
    length = max(len(row["tokens"]) for row in rows)

    def padded(name: str, fill: int) -> np.ndarray:
        return np.array([row[name] + [fill] * (length - len(row[name])) for row in rows])

    kinds = padded("kinds", schema.PAD)
    starts = (kinds == schema.SLOT) & (padded("tokens", 0) == CLASS)
    return recordings.token_table(
        padded("tokens", 0),
        kinds,
        [_joined(row["images"], 0) for row in rows],
        padded("labels", recordings.IGNORED),
        segment_ids=(kinds != schema.PAD).astype(int),
        image_ids=np.where(np.isin(kinds, recordings.IMAGE_KINDS), np.cumsum(starts, axis=1), 0),
        patch_hw=[_joined(row["images"], 1) for row in rows],
    )


def one_image_a_row(images: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, jnp.ndarray]:
    """A batch with every image alone in a row."""
    ids = np.full((len(images), 1), -1)
    inputs = {
        "in.input_ids": ids,
        "in.attention_mask": np.ones_like(ids),
        "in.labels": ids * 0 + recordings.IGNORED,
    }
    return table(inputs, images, placeholder=-1)


def _joined(images: Sequence[tuple[np.ndarray, np.ndarray]], part: int) -> np.ndarray:
    return np.concatenate([image[part] for image in images]) if images else np.zeros((0, (0, 2)[part]), int)
