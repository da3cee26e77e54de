"""Three resolutions of one small model of the quickstart sweep, among little text and among much.

python -m neo_jax.sweep run --config=configs/sweeps/resolutions.py --workdir=runs/sweeps/resolutions
"""

from ml_collections import ConfigDict, FrozenConfigDict

from configs import base
from configs.sweeps import quickstart
from neo_jax.sweep import cells, grids

SIDES = (32, 48, 64)  # 4, 9 and 16 tokens an image, beside about 11 of its caption
# Shares of documents; `words` are captions without their drawings.
MIXES = {"images": {"drawings": 1.0}, "text": {"drawings": 0.25, "words": 0.75}}


def model() -> ConfigDict:
    c = quickstart.one_size("w24", steps=200)
    folder = c.data.path
    c.data.tokenizer = f"{folder}/tokenizer.json"
    c.data.sources.drawings = base.source("drawings", f"{folder}/train/*.array_record")
    c.data.sources.words = base.source("drawings", f"{folder}/train/*.array_record", form="text")
    c.data.sources.held_out = base.source("drawings", f"{folder}/dev/*.array_record", split="dev")
    c.stage.full.row_patches = 120  # of 192 tokens: more than documents of the largest images fill
    return c


def get_sweep() -> list[cells.Cell]:
    return grids.resolutions(model(), SIDES, MIXES)


def get_config(name: str) -> FrozenConfigDict:
    return cells.find(get_sweep(), name)
