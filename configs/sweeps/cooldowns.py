"""Is a run cut short as good as one planned short? Cooldowns from one trunk, beside runs with a cosine each.

python -m neo_jax.sweep run --config=configs/sweeps/cooldowns.py --workdir=runs/sweeps/cooldowns
"""

import dataclasses

from ml_collections import FrozenConfigDict

from configs.sweeps import quickstart
from neo_jax.sweep import cells, grids

SIZE = "w24"
STEPS = (75, 150, 300)


def get_sweep() -> list[cells.Cell]:
    [size] = [size for size in quickstart.SIZES if size.name == SIZE]
    cooled = grids.cooldowns(quickstart.model(), [size], STEPS)
    planned = cells.build(
        quickstart.one_size(SIZE, steps=STEPS[-1]),
        [cells.Change(f"cosine-D{steps}", {"stage.full.steps": steps}, arm="cosine") for steps in STEPS],
    )
    return [*(dataclasses.replace(cell, arm="wsd") for cell in cooled), *planned]


def get_config(name: str) -> FrozenConfigDict:
    return cells.find(get_sweep(), name)
