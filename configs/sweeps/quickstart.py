"""IsoFLOP sweep of tiny NEOs on the quickstart's data: seven sizes at four budgets, from seven trunks.

python -m neo_jax.sweep run --config=configs/sweeps/quickstart.py --workdir=runs/sweeps/quickstart
python -m neo_jax.scaling fit --results=runs/sweeps/quickstart --out=runs/sweeps/quickstart/scaling
"""

from ml_collections import ConfigDict, FrozenConfigDict

from configs import base, quickstart
from neo_jax.sweep import cells, grids

# Depth and rate go with the width; rates fall about as width**-0.5 from the quickstart's 3e-3 at 128.
SIZES = [
    grids.size("w8", width=8, layers=2, heads=1, pre_buffer=1, peak_lr=1e-2),
    grids.size("w12", width=12, layers=2, heads=1, pre_buffer=1, peak_lr=9e-3),
    grids.size("w16", width=16, layers=2, heads=2, pre_buffer=1, peak_lr=8e-3),
    grids.size("w24", width=24, layers=2, heads=2, pre_buffer=1, peak_lr=7e-3),
    grids.size("w32", width=32, layers=3, heads=2, pre_buffer=1, peak_lr=6e-3),
    grids.size("w48", width=48, layers=3, heads=3, pre_buffer=1, peak_lr=5e-3),
    grids.size("w64", width=64, layers=4, heads=4, pre_buffer=1, peak_lr=4e-3),
]
BUDGETS = (3e10, 6e10, 1.2e11, 2.4e11)
DOCUMENT_TOKENS = 20  # nine of the image, the rest its caption


def model() -> ConfigDict:
    """The quickstart's model and data in one stage; every size starts from here."""
    c = quickstart.get_config()
    c.model.embed.hidden_size = 32
    c.model.remat_policy = "none"
    c.stages = ("full",)
    stage = dict(c.stage.full) | dict(
        batch_size=4, warmup_steps=5, schedule="wsd", cooldown_share=0.2, min_lr_ratio=0.02, steps=100
    )
    c.stage = ConfigDict({"full": base.stage(**stage)})
    c.eval.splits = ("dev",)
    c.train.log_every = 5
    c.train.eval_every = 0
    c.train.save_every = 100_000
    return c


def one_size(name: str, steps: int) -> ConfigDict:
    """For the other sweeps of this folder: a size and a length, with a decay of its own."""
    [size] = [size for size in SIZES if size.name == name]
    c = model()
    c.update_from_flattened_dict({field.replace("*", "stage.full"): x for field, x in size.values.items()})
    c.stage.full.schedule, c.stage.full.steps = "cosine", steps
    return c


def get_sweep() -> list[cells.Cell]:
    return grids.isoflop(model(), SIZES, BUDGETS, document_tokens=DOCUMENT_TOKENS)


def get_config(name: str) -> FrozenConfigDict:
    return cells.find(get_sweep(), name)
