"""Three learning rates at three batch sizes, one small model of the quickstart sweep, all at as many tokens.

python -m neo_jax.sweep run --config=configs/sweeps/lr_batch.py --workdir=runs/sweeps/lr_batch
"""

from ml_collections import ConfigDict, FrozenConfigDict

from configs.sweeps import quickstart
from neo_jax.sweep import cells, grids

# Far enough apart for runs this short to differ: factors of three and of four.
RATES = (1.8e-2, 5.4e-2, 1.62e-1)
BATCH_SIZES = (2, 8, 32)


def model() -> ConfigDict:
    """Steps and warm-up are those of the batch in the middle; they fall as the batch grows."""
    c = quickstart.one_size("w16", steps=120)
    c.stage.full.batch_size, c.stage.full.warmup_steps = 8, 8
    return c


def get_sweep() -> list[cells.Cell]:
    return grids.lr_batch(model(), RATES, BATCH_SIZES)


def get_config(name: str) -> FrozenConfigDict:
    return cells.find(get_sweep(), name)
