"""Held-out loss, measured in the same way during training and afterwards."""

import jax
from ml_collections import ConfigDict

from data_pipelines.loader import eval_batches
from neo_jax import mesh as mesh_lib, step as step_lib
from neo_jax.model.transformer import Transformer
from neo_jax.params import Params


def held_out_loss(
    config: ConfigDict,
    stage: ConfigDict,
    model: Transformer,
    params: Params,
    split: str,
    mesh: jax.sharding.Mesh,
) -> float:
    """sum(ce * w) / sum(w) over a whole split, packed to the budgets of `stage`."""
    eval_step = jax.jit(step_lib.make_eval_step(model, num_sources=1))
    loss = weight = 0.0
    for batch in eval_batches(config, stage, split):
        sums = eval_step(params, mesh_lib.put_batch(mesh, batch))
        loss, weight = loss + float(sums["loss"]), weight + float(sums["weight"])
    return loss / weight
