"""The row that the report shows, and the mask that the model makes of it."""

import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from data_pipelines.loader import train_loader
from data_pipelines.page.rows import Row
from neo_jax import stages as stages_lib
from neo_jax.model import mask
from neo_jax.train import data_seed


def first_row(config: FrozenConfigDict) -> tuple[Row, list[str]]:
    """(row 0 of the first batch of the last stage, as training read it; names of the sources)."""
    stage = stages_lib.plan(config)[-1]
    with train_loader(config, stage.config, seed=data_seed(config.seed, stage)) as loader:
        batch = next(loader)
        return {name: array[0] for name, array in batch.items()}, loader.source_names


def intervals(row: Row, mask_kind: str) -> tuple[np.ndarray, np.ndarray]:
    """int32 [L] each: first key, and the one after the last, of every query; from the model's function."""
    start, end = mask.MASKS[mask_kind]({name: jnp.asarray(array)[None] for name, array in row.items()})
    return np.asarray(start)[0], np.asarray(end)[0]
