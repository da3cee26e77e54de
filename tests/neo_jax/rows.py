"""Random packed rows and tiny models for tests."""

import numpy as np
from ml_collections import ConfigDict

from configs import base
from data_pipelines import pack, schema
from data_pipelines.schema import Document

IMAGE_CONTEXT, IMAGE_START, IMAGE_END = 3, 4, 5


def tiny_model(**changes) -> ConfigDict:
    """A model config of a few thousand parameters; one image token is 4 x 4 pixels."""
    c = base.model()
    c.vocab_size, c.hidden_size, c.mlp_size = 64, 32, 48
    c.num_layers, c.pre_buffer = 3, 1
    c.num_heads, c.num_kv_heads, c.head_dim = 4, 2, 8
    c.init_std = 0.1  # large enough for a random model to have opinions
    c.embed.patch_size, c.embed.merge_size, c.embed.hidden_size = 2, 2, 8
    c.update_from_flattened_dict(changes)
    return c


PATCH_DIM = 4 * 4 * 3


def document(rng: np.random.Generator, grids=((2, 3),), words=(3, 4), source_id=0) -> Document:
    """words[0] words, then for each grid an image and its words; words are supervised."""
    tokens, image_ids, hw = list(rng.integers(6, 64, words[0])), [0] * words[0], []
    for number, grid in enumerate(grids, start=1):
        count = grid[0] * grid[1]
        text = list(rng.integers(6, 64, words[number]))
        tokens += [IMAGE_START, *[IMAGE_CONTEXT] * count, IMAGE_END, *text]
        image_ids += [0, *[number] * count, 0, *[0] * len(text)]
        hw.append(np.indices(grid).reshape(2, -1).T)
    tokens, image_ids = np.array(tokens, np.int32), np.array(image_ids, np.int32)
    is_patch = image_ids > 0
    hw = np.concatenate(hw).astype(np.int32) if hw else np.zeros((0, 2), np.int32)
    coords = np.zeros((len(tokens), 3), np.float32)
    after_start = np.append([False], tokens[:-1] == IMAGE_START)
    coords[:, 0] = np.cumsum(~is_patch + after_start.astype(int)) - 1
    coords[is_patch, 1:] = hw
    targets = np.append(tokens[1:], 0).astype(np.int32)
    weights = np.where((targets > 5) & ~is_patch, rng.uniform(0.1, 1, len(tokens)), 0).astype(np.float32)
    pixels = rng.integers(0, 256, (len(hw), PATCH_DIM)).astype(np.uint8)
    return Document(
        name="random",
        tokens=tokens,
        kinds=np.where(is_patch, schema.PATCH, schema.TEXT).astype(np.int32),
        image_ids=image_ids,
        coords=coords,
        targets=targets,
        loss_weights=weights,
        patch_hw=hw,
        load_patches=lambda out=None: pixels,
        source_id=source_id,
    )


def documents(rng: np.random.Generator, count: int) -> list[Document]:
    """Text-only documents, captions and interleaved ones."""
    kinds = [((), (9,)), (((2, 3),), (3, 4)), (((1, 2), (3, 2)), (2, 3, 5)), (((2, 2),), (0, 6))]
    chosen = [kinds[index] for index in rng.integers(0, len(kinds), count)]
    return [document(rng, *kind, source_id=index % 3) for index, kind in enumerate(chosen)]


def batch(seed: int = 0, rows: int = 4, row_tokens: int = 40, row_patches: int = 16) -> dict[str, np.ndarray]:
    """`rows` packed rows of random documents, with padding at their ends."""
    budgets = pack.row_budgets(row_tokens, row_patches)
    packed = pack.pack_rows(documents(np.random.default_rng(seed), rows * 3), budgets)[:rows]
    return pack.stack(packed, rows, row_tokens, row_patches, PATCH_DIM)
