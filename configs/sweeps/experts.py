"""Dense, experts by modality and learned experts at equal active FLOPs, each with two seeds.

python -m neo_jax.sweep run --config=configs/sweeps/experts.py --workdir=runs/sweeps/experts
"""

from ml_collections import FrozenConfigDict

from configs.sweeps import quickstart
from neo_jax.sweep import cells, grids

SEEDS = (0, 1)  # what differs between them is no difference between arms


def get_sweep() -> list[cells.Cell]:
    return grids.experts_and_dense(quickstart.one_size("w24", steps=200), cells.axis("seed", SEEDS))


def get_config(name: str) -> FrozenConfigDict:
    return cells.find(get_sweep(), name)
