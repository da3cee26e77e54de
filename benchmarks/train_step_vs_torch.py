"""Our train step against the same one in PyTorch, eager and compiled: tokens per second on this CPU.

    python -m benchmarks.train_step_vs_torch [--sizes=5M,20M,60M] [--repeats=5] [--json]

Every contender trains the same NEO from the same parameters on the same packed rows, by turns in one process,
each with all cores of the machine. Their losses must agree to 1e-4 at every step, or the command fails.
Ratios are ours / theirs in tokens per second, of medians: above 1, ours is faster. On a machine that others
use, run it on one core (taskset -c 0) and read the ratios per CPU second, as threads that wait for each other
make wall times there say little. PyTorch compiles with the system's C++ compiler.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ml_collections import FrozenConfigDict

from benchmarks import ours, rows, torch_neo, turns
from configs import base
from neo_jax import config as config_lib, objectives, params as params_lib

# Model sizes: width, heads, layers (two of them pre-buffer), inner width, vocabulary.
SIZES = {
    "5M": (256, 4, 5, 768, 2048),
    "20M": (384, 6, 7, 1152, 8192),
    "60M": (640, 10, 8, 1920, 16384),
}
ROWS, LENGTH, PATCHES = 2, 1024, 768
TOLERANCE = 1e-4  # of losses, relative


def config_of(size: str, **changes: Any) -> FrozenConfigDict:
    """A NEO of one size with everything trainable; `changes` are fields of its stage."""
    c = base.get_config()
    m = c.model
    m.hidden_size, m.num_heads, m.num_layers, m.mlp_size, m.vocab_size = SIZES[size]
    m.num_kv_heads, m.head_dim, m.init_std = 2, 64, m.hidden_size**-0.5
    c.stages = ("full",)
    stage = dict(batch_size=ROWS, row_tokens=LENGTH, row_patches=PATCHES, warmup_steps=0, min_lr_ratio=1.0)
    c.stage.full = base.stage(1000, **stage | changes)
    return config_lib.resolve(c)


def contenders(
    config: FrozenConfigDict, batch: dict[str, np.ndarray], compiled: bool = True
) -> dict[str, Callable[[], float]]:
    """Functions that take one train step and return its loss: ours, PyTorch's eager, PyTorch's compiled."""
    trainer = ours.Trainer(config)
    on_mesh, theirs = trainer.put(batch), torch_neo.tensors(batch)
    params = {path: np.asarray(x) for path, x in trainer.state.params.items()}
    steps: dict[str, Callable[[], float]] = {"ours": lambda: trainer.step(on_mesh)}
    for name in ("eager", "compiled") if compiled else ("eager",):
        model = torch_neo.Neo(config.model)
        torch_neo.load(model, params)
        other = torch_neo.Trainer(model, config.stage.full, compiled=name == "compiled")
        steps[name] = lambda other=other: other.step(theirs)
    return steps


def measure(config: FrozenConfigDict, repeats: int, compiled: bool = True) -> dict[str, float]:
    """Tokens per second of each contender, and the ratios of ours to theirs (`_cpu`: per CPU second).

    Raises:
        ValueError: the contenders do not compute the same losses.
    """
    stage = config.stage.full
    batch = rows.batch(config.model, stage.batch_size, stage.row_tokens, stage.row_patches)
    losses: dict[str, list[float]] = {}
    steps = {
        name: lambda name=name, step=step: losses.setdefault(name, []).append(step())
        for name, step in contenders(config, batch, compiled).items()
    }
    spent = turns.take(steps, repeats)
    for name, values in losses.items():
        if not np.allclose(values, losses["ours"], rtol=TOLERANCE, atol=0):
            raise ValueError(f"losses differ: ours {losses['ours']}, {name} {values}")
    tokens = int((batch["kinds"] > 0).sum())
    result = {f"{name}_tokens_per_s": tokens / spent[name].wall for name in spent}
    for name in spent.keys() - {"ours"}:
        result[f"vs_{name}"] = spent[name].wall / spent["ours"].wall
        result[f"vs_{name}_cpu"] = spent[name].cpu / spent["ours"].cpu
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=turns.REPEATS)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if unknown := set(args.sizes) - set(SIZES):
        sys.exit(f"error: --sizes: {', '.join(sorted(unknown))} is not among {', '.join(SIZES)}")
    results = {}
    print(f"{'size':>6}{'parameters':>12}{'tokens/s':>10}{'vs eager':>10}{'compiled':>10}   per CPU second")
    for size in args.sizes:
        config = config_of(size)
        results[size] = r = measure(config, args.repeats)
        ratios = "".join(f"{r[f'vs_{name}']:>9.2f}x" for name in ("eager", "compiled"))
        by_cpu = "".join(f"{r[f'vs_{name}_cpu']:>7.2f}x" for name in ("eager", "compiled"))
        print(f"{size:>6}{count(config):>12,}{r['ours_tokens_per_s']:>10.0f}{ratios}{by_cpu}", flush=True)
    if args.json:
        print(json.dumps({"threads": torch.get_num_threads(), "train_step": results}))


def count(config: FrozenConfigDict) -> int:
    return params_lib.count(params_lib.abstract(objectives.build(config)))


if __name__ == "__main__":
    main()
