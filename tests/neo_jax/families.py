"""The experiments in configs/, and documents as each of them lays them out."""

from pathlib import Path

import numpy as np
from ml_collections import FrozenConfigDict

from data_pipelines import pack, text
from data_pipelines.images import Picture
from data_pipelines.schema import Document
from data_pipelines.template import IMAGE, Piece
from neo_jax import config as config_lib

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = (
    "neo_2b",
    "neo_9b",
    "neo_ov_2b",
    "solo_7b",
    "eve_7b",
    "evev2_7b",
    "fuyu_8b",
    "mono_internvl_2b",
    "hovle_2b",
    "breen_7b",
)


def load(name: str) -> FrozenConfigDict:
    """The resolved config of "neo_2b" or "neo_2b:smoke"."""
    file, colon, arg = name.partition(":")
    return config_lib.load(str(CONFIGS / f"{file}.py") + colon + arg)


class Vocabulary:
    """Special tokens get the last ids, words are numbers."""

    def __init__(self, size: int):
        self.size, self.special = size, {}

    def special_id(self, name: str) -> int:
        return self.special.setdefault(name, self.size - 1 - len(self.special))

    def encode(self, words: str) -> list[int]:
        return [int(word) for word in words.split()]


def document(config, rng: np.random.Generator, grids=((2, 3), (1, 2)), words=(3, 4, 5)) -> Document:
    """words[0] words, then for each grid of image tokens an image and its words; words are supervised."""
    side = config.model.embed.patch_size * config.model.embed.merge_size

    def picture(rows: int, cols: int) -> Picture:
        pixels = rng.integers(0, 256, (rows * cols, side * side * 3)).astype(np.uint8)
        return Picture(rows, cols, lambda out=None: pixels)

    def some(count: int) -> Piece:
        return Piece(" ".join(map(str, rng.integers(0, 1000, count))), supervised=True)

    pieces = [some(words[0])]
    for count in words[1:]:
        pieces += [IMAGE, some(count)]
    pictures = [picture(*grid) for grid in grids]
    coords = config.model.coords
    return text.build_document(
        Vocabulary(config.model.vocab_size),
        pictures,
        [piece for piece in pieces if piece.text],
        layout=config.data.layout,
        coords=coords.kind,
        delta=coords.delta,
    )


def stack(config, documents, rows=None, row_tokens=None, row_patches=None) -> dict[str, np.ndarray]:
    """A batch of rows of documents, as long as the first stage's unless said otherwise."""
    stage = config.stage[config.stages[0]]
    side = config.model.embed.patch_size * config.model.embed.merge_size
    return pack.stack(
        documents,
        rows or len(documents),
        row_tokens or stage.row_tokens,
        row_patches or stage.row_patches,
        side * side * 3,
    )
