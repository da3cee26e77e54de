"""Packed rows of made-up captions: pictures of several shapes, each with a text that is to be predicted."""

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import pack, schema
from data_pipelines.schema import Document

WORD = 8  # smaller numbers are markers


def caption(rng: np.random.Generator, model: ConfigDict, grid: tuple[int, int], words: int) -> Document:
    """A picture of grid rows x columns of image tokens between two markers, then its words."""
    count = grid[0] * grid[1]
    places = np.indices(grid).reshape(2, -1).T.astype(np.int32)
    is_patch = np.repeat([False, True, False], [1, count, 1 + words])
    tokens = rng.integers(WORD, model.vocab_size, len(is_patch)).astype(np.int32)
    tokens[[0, count + 1]] = 1, 2
    tokens[is_patch] = 3
    # All tokens of a picture stand at one t (NEO).
    t = np.concatenate([[0], np.ones(count), 2 + np.arange(1 + words)])
    coords = np.zeros((len(tokens), 3), np.float32)
    coords[:, 0] = t
    coords[is_patch, 1:] = places
    predicts = np.arange(len(tokens)) > count
    predicts[-1] = False
    side = model.embed.patch_size * model.embed.merge_size
    pixels = rng.integers(0, 256, (count, 3 * side**2), np.uint8)
    return Document(
        name="caption",
        tokens=tokens,
        kinds=np.where(is_patch, schema.PATCH, schema.TEXT).astype(np.int32),
        image_ids=is_patch.astype(np.int32),
        coords=coords,
        targets=np.append(tokens[1:], 0).astype(np.int32),
        loss_weights=predicts.astype(np.float32),
        patch_hw=places,
        load_patches=lambda out=None: pixels,
    )


def batch(
    model: ConfigDict, rows: int, length: int, patches: int, span: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """The `rows` fullest rows of many captions, each of `length` tokens and `patches` image tokens.

    Pictures have (span / 16) ** 0.5 to (span / 4) ** 0.5 image tokens a side, captions span / 32 to 3 / 32
    of span words; at 1024, the default being `length`, 64 to 256 image tokens and 32 to 96 words.
    """
    span = length if span is None else span
    rng = np.random.default_rng(seed)
    side = model.embed.patch_size * model.embed.merge_size
    low, high = round((span / 16) ** 0.5), round((span / 4) ** 0.5)
    documents = []
    for _ in range(2 * rows * length // (low**2 + span // 32)):
        grid = tuple(rng.integers(low, high + 1, 2).tolist())
        documents.append(caption(rng, model, grid, int(rng.integers(span // 32, 3 * span // 32 + 1))))
    packed = pack.pack_rows(documents, pack.row_budgets(length, patches))
    packed.sort(key=lambda row: -sum(len(document.tokens) for document in row))
    return pack.stack(packed[:rows], rows, length, patches, 3 * side**2)
