"""Held-out loss, measured in the same way during training and afterwards."""

import functools

import jax
from ml_collections import ConfigDict

from data_pipelines.loader import eval_batches
from neo_jax import mesh as mesh_lib
from neo_jax.model.mask import Batch
from neo_jax.model.transformer import Transformer
from neo_jax.params import Params, bind
from neo_jax.step import Metrics, loss_sums


def held_out_loss(
    config: ConfigDict,
    stage: ConfigDict,
    model: Transformer,
    params: Params,
    split: str,
    mesh: jax.sharding.Mesh,
) -> float:
    """sum(ce * w) / sum(w) over a whole split, packed to the budgets of `stage`."""
    loss = weight = 0.0
    share = mesh_lib.share(mesh)
    for batch in eval_batches(config, stage, split, process_index=share.index, process_count=share.count):
        sums = _sums(model, params, mesh_lib.put_batch(mesh, batch))
        loss, weight = loss + float(sums["loss"]), weight + float(sums["weight"])
    return loss / weight


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all splits and all calls
def _sums(model: Transformer, params: Params, batch: Batch) -> Metrics:
    return loss_sums(bind(model, params), batch, num_sources=1)
