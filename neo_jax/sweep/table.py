"""One row per cell: sizes, data, compute and losses, from the run's own records alone.

Written to results.parquet and results.jsonl in the sweep's workdir. Units: parameters, tokens, FLOPs
(multiply-add = 2, flops.py), nats per token, seconds. A cell that has not logged yet has its sizes only; a
field that does not apply is null.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
from ml_collections import FrozenConfigDict

from neo_jax import config as config_lib, metrics, objectives, params as params_lib, workdir as workdir_lib
from neo_jax.sweep import local
from neo_jax.sweep.cells import Cell
from neo_jax.sweep.local import Sweep

EMBEDDINGS = ("token_embed", "head")  # one row per word of the vocabulary
BY_SOURCE = "tokens/"  # what the log has seen of each source


def write(sweep: Sweep) -> list[dict[str, Any]]:
    """Gathers the rows of all cells and writes both files, if the folder is there; returns the rows."""
    rows = [row(sweep, cell) for cell in sweep.cells]
    names = list(dict.fromkeys(name for one in rows for name in one))
    rows = [{name: one.get(name) for name in names} for one in rows]
    if not sweep.workdir.is_dir():
        return rows
    _replace(sweep.workdir / "results.jsonl", "".join(json.dumps(one) + "\n" for one in rows).encode())
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    _replace(sweep.workdir / "results.parquet", sink.getvalue().to_pybytes())
    return rows


def row(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """A cell's row.

    `loss` and `loss/SOURCE` are held out, on the first split of config.eval.splits, at the end of the run;
    without a split they are those of the last logged training step. `train_loss` is always that.
    `share/SOURCE`: of the training tokens. `n_active`: what a token uses.
    """
    workdir = sweep.run_folder(cell)
    ran = (workdir / "config.json").exists()  # on a mesh that its batch may have been fitted to
    config = workdir_lib.load_config(workdir) if ran else sweep.config(cell)
    ended = local.ending(sweep, cell)
    lines = metrics.read(workdir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval" in line]
    seen: dict[str, Any] = next((line["seen"] for line in reversed(lines) if "seen" in line), {})
    loss, sources, splits = _losses(config, steps, evaluated)
    status = local.DIVERGED if ended.status == local.DONE and not _finite(loss) else ended.status
    stage = config.stage[config.stages[-1]]
    found = {
        "name": cell.name,
        "arm": cell.arm or None,
        "budget": cell.budget,
        "status": status,
        "message": ended.message or None,
        "trunk": cell.trunk or None,
        "seed": config.seed,
        "lr": stage.peak_lr,
        "batch_size": stage.batch_size,
        "steps": sum(config.stage[name].steps for name in config.stages),
        "steps_taken": lines[-1]["step"] if lines else None,
        **sizes(config),
        "tokens": seen.get("tokens"),
        "text_tokens": seen["tokens"] - seen["visual_tokens"] if seen else None,
        "image_tokens": seen.get("visual_tokens"),
        "images": seen.get("images"),
        "flops": seen.get("flops"),
        "loss": loss,
        "train_loss": steps[-1]["loss"] if steps else None,
        "seconds": ended.seconds or None,
        "config_hash": config_lib.config_hash(config),
        "workdir": str(workdir.relative_to(sweep.workdir)),
    }
    return (
        found
        | {f"loss/{name}": value for name, value in sources.items()}
        | {f"split/{name}": value for name, value in splits.items()}
        | {
            f"share/{name.removeprefix(BY_SOURCE)}": tokens / seen["tokens"]
            for name, tokens in seen.items()
            if name.startswith(BY_SOURCE)
        }
    )


def sizes(config: FrozenConfigDict) -> dict[str, int]:
    """N of a config: all; without token embedding and output head; of those, what one token uses."""
    taken, num = config.model.experts.per_token, config.model.experts.num
    specs = params_lib.abstract(objectives.build(config))
    inner = {path: spec for path, spec in specs.items() if not path.startswith((*EMBEDDINGS, "objectives/"))}
    return {
        "n_total": params_lib.count(specs),
        "n_non_embedding": params_lib.count(inner),
        # Of a module routed by modality a token uses the first or the second weights, of the experts some.
        "n_active": sum(
            params_lib.count({path: spec}) * (taken if "/experts/" in path else num) // num
            for path, spec in inner.items()
            if "/visual/" not in path
        ),
    }


def _losses(
    config: FrozenConfigDict, steps: Sequence[Mapping[str, Any]], evaluated: Sequence[Mapping[str, Any]]
) -> tuple[float | None, Mapping[str, float], Mapping[str, float]]:
    """(the loss, the same by source, by split)."""
    if config.eval.splits and evaluated:
        split, last = config.eval.splits[0], evaluated[-1]
        return last["eval"][split], last["eval_source"][split], last["eval"]
    if config.eval.splits or not steps:
        return None, {}, {}
    return steps[-1]["loss"], steps[-1]["source_loss"], {}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _replace(path: pathlib.Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # `run` and `status` may write at once
    partial.write_bytes(data)
    partial.rename(path)
