"""Held-out loss, measured in the same way during training and afterwards."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

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

# Compiled once for all splits and all calls.
_PROGRAMS: dict[tuple, Callable[[Params, Batch], Metrics]] = {}


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
    compiling: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    after_batch: Callable[[], None] = lambda: None,
) -> HeldOut:
    """sum(ce * w) / sum(w) over a whole split, packed to the budgets of `stage`.

    Args:
        compiling: calls the function it is given, which compiles, and returns its result.
        after_batch: called after every batch; may raise.
    """
    names = open_data(config.data).source_names
    loss = weight = 0.0
    by_source = np.zeros((2, len(names)))
    share = mesh_lib.share(mesh)
    for batch in eval_batches(config, stage, split, process_index=share.index, process_count=share.count):
        arrays = mesh_lib.put_batch(mesh, batch)
        shardings = frozenset((path, x.sharding) for path, x in params.items())
        key = (model, len(names), shardings, *((name, x.shape) for name, x in sorted(arrays.items())))
        if key not in _PROGRAMS:
            compile_ = functools.partial(_compile, model, len(names), params, arrays, mesh)
            _PROGRAMS[key] = compiling(compile_)
        sums = _PROGRAMS[key](params, arrays)
        loss, weight = loss + float(sums["loss"]), weight + float(sums["weight"])
        by_source += np.asarray(jax.device_get([sums["source_loss"], sums["source_weight"]]), float)
        after_batch()
    sources = {
        name: float(part / whole) for name, part, whole in zip(names, *by_source, strict=True) if whole > 0
    }
    return HeldOut(loss / weight, sources)


def _compile(
    model: Transformer, num_sources: int, params: Params, batch: Batch, mesh: jax.sharding.Mesh
) -> Callable[[Params, Batch], Metrics]:
    def sums(params: Params, batch: Batch) -> Metrics:
        return loss_sums(bind(model, params), batch, num_sources)

    whole = mesh_lib.replicated(mesh)  # every process reads them
    return jax.jit(sums, out_shardings=whole).lower(params, batch).compile()
