"""Three resolutions of one small model of the quickstart sweep, in rows with room for many images or few.

python -m neo_jax.sweep run --config=configs/sweeps/resolutions.py --workdir=runs/sweeps/resolutions
"""

from ml_collections import ConfigDict, FrozenConfigDict

from configs.sweeps import quickstart
from neo_jax.sweep import cells, grids

SIDES = (32, 48, 64)  # 4, 9 and 16 tokens an image, beside about 11 of its caption
# Of 192 tokens a row. 120 is more than documents of any of these sizes fill; 48 leaves rows of the larger two
# partly empty.
ROW_PATCHES = (48, 120)


def model() -> ConfigDict:
    return quickstart.one_size("w24", steps=200)


def get_sweep() -> list[cells.Cell]:
    return grids.resolutions(model(), SIDES, ROW_PATCHES)


def get_config(name: str) -> FrozenConfigDict:
    return cells.find(get_sweep(), name)
