"""Held-out loss, measured in the same way during training and afterwards."""

import dataclasses
import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.dataset import open_data
from data_pipelines.loader import eval_batches
from neo_jax import mesh as mesh_lib
from neo_jax.model.mask import Batch
from neo_jax.model.transformer import Transformer
from neo_jax.params import Params, bind
from neo_jax.step import Metrics, loss_sums


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Nats per token of a split, `loss` by the weights of its tokens, and the same of each source in it."""

    loss: float
    sources: dict[str, float]


def held_out_loss(
    config: ConfigDict,
    stage: ConfigDict,
    model: Transformer,
    params: Params,
    split: str,
    mesh: jax.sharding.Mesh,
) -> HeldOut:
    """sum(ce * w) / sum(w) over a whole split, packed to the budgets of `stage`."""
    names = open_data(config.data).source_names
    loss = weight = 0.0
    by_source = np.zeros((2, len(names)))
    share = mesh_lib.share(mesh)
    for batch in eval_batches(config, stage, split, process_index=share.index, process_count=share.count):
        sums = _sums(model, len(names), params, mesh_lib.put_batch(mesh, batch))
        loss, weight = loss + float(sums["loss"]), weight + float(sums["weight"])
        by_source += np.asarray(jax.device_get([sums["source_loss"], sums["source_weight"]]), float)
    sources = {
        name: float(part / whole) for name, part, whole in zip(names, *by_source, strict=True) if whole > 0
    }
    return HeldOut(loss / weight, sources)


@functools.partial(jax.jit, static_argnums=(0, 1))  # compiled once for all splits and all calls
def _sums(model: Transformer, num_sources: int, params: Params, batch: Batch) -> Metrics:
    return loss_sums(bind(model, params), batch, num_sources)
