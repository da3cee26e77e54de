"""Two of the quickstart's styles of drawing in five mixtures, with five pairs of size and length each.

python -m neo_jax.sweep run --config=configs/sweeps/mixtures.py --workdir=runs/sweeps/mixtures
python -m neo_jax.scaling fit --results=runs/sweeps/mixtures --out=runs/sweeps/mixtures/scaling
"""

from ml_collections import ConfigDict, FrozenConfigDict

from configs.sweeps import quickstart
from neo_jax.sweep import cells, grids

# Shares of documents, far enough from each other to count as different mixtures of tokens.
MIXTURES = {
    f"noto{share:02}": {"noto": share / 100, "fluent": 1 - share / 100} for share in (10, 30, 50, 70, 90)
}
# The corners and the middle of size x steps: the law over mixtures needs no law for each mixture.
RUNS = (("w12", 60), ("w12", 240), ("w24", 120), ("w48", 60), ("w48", 240))


def model() -> ConfigDict:
    """The quickstart sweep's; runs this short each end with a decay of their own."""
    c = quickstart.model()
    c.stage.full.schedule = "cosine"
    return c


def get_sweep() -> list[cells.Cell]:
    sizes = {size.name: size for size in quickstart.SIZES}
    runs = cells.zip_(
        [sizes[name] for name, _ in RUNS],
        cells.axis("stage.full.steps", [steps for _, steps in RUNS], "s"),
    )
    return grids.mixtures(model(), MIXTURES, runs)


def get_config(name: str) -> FrozenConfigDict:
    return cells.find(get_sweep(), name)
