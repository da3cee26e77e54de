"""Our train step against the same one in PyTorch, eager and compiled: tokens per second on this CPU.

    python -m benchmarks.train_step [--sizes=5M,20M,60M] [--repeats=5] [--json]

Every contender trains the same NEO from the same parameters on the same packed rows, with all cores of the
machine, in a process of its own, as a training run has one: on a shared heap one takes the memory that the
other freed, and the system hands it out anew at every step. They take turns. The command fails where their
losses differ by more than 1e-4.

Ratios are ours / theirs in tokens per second, of medians: above 1, ours is faster. On a machine that others
use, run it on one core (taskset -c 0) and read the ratios per CPU second, as threads that wait for each other
make wall times there say little. PyTorch compiles with the system's C++ compiler.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
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
CONTENDERS = ("ours", "eager", "compile")  # the last two are PyTorch, without and with torch.compile
ROWS, LENGTH, PATCHES = 2, 1024, 768
TOLERANCE = 1e-4  # of losses, relative
PEAK_LR = 1e-4  # small: the steps that compare losses must not amplify rounding
WARM_UP = 3  # turns that do not count: compilation, and the heap until it has grown


def config_of(size: str, **changes: Any) -> FrozenConfigDict:
    """A NEO of one size with everything trainable; `changes` are fields of its stage."""
    c = base.get_config()
    m = c.model
    m.hidden_size, m.num_heads, m.num_layers, m.mlp_size, m.vocab_size = SIZES[size]
    m.num_kv_heads, m.head_dim, m.init_std = 2, 64, m.hidden_size**-0.5
    c.stages = ("full",)
    stage = dict(batch_size=ROWS, row_tokens=LENGTH, row_patches=PATCHES)
    stage |= dict(peak_lr=PEAK_LR, warmup_steps=0, min_lr_ratio=1.0)
    c.stage.full = base.stage(1000, **stage | changes)
    return config_lib.resolve(c)


def contender(name: str, config: FrozenConfigDict, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """Function that takes one train step and returns its loss: one of CONTENDERS."""
    trainer = ours.Trainer(config)
    if name == "ours":
        on_mesh = trainer.put(batch)
        return lambda: trainer.step(on_mesh)
    model = torch_neo.Neo(config.model)
    torch_neo.load(model, {path: np.asarray(x) for path, x in trainer.state.params.items()})
    other, tensors = (
        torch_neo.Trainer(model, config.stage.full, compiled=name == "compile"),
        torch_neo.tensors(batch),
    )
    return lambda: other.step(tensors)


def take_turns(turn: Connection, name: str, config: FrozenConfigDict) -> None:
    """A contender's process: a step, its loss and its wall and CPU seconds, whenever it is asked for one."""
    step = contender(name, config, batch_of(config))
    while turn.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        turn.send((loss, time.perf_counter() - wall, time.process_time() - cpu))


def batch_of(config: FrozenConfigDict) -> dict[str, np.ndarray]:
    stage = config.stage.full
    return rows.batch(config.model, stage.batch_size, stage.row_tokens, stage.row_patches)


def measure(config: FrozenConfigDict, repeats: int, compiled: bool = True) -> dict[str, float]:
    """tokens_per_s of ours, and ratio_vs_torch_{eager,compile} of ours to theirs (`_cpu`: per CPU second).

    Raises:
        ValueError: the contenders do not compute the same losses.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, taken = {}, {}, {}
    for name in CONTENDERS if compiled else CONTENDERS[:-1]:
        pipes[name], other_end = spawn.Pipe()
        processes[name] = spawn.Process(target=take_turns, args=(other_end, name, config), daemon=True)
        processes[name].start()
        other_end.close()  # so that a process that died is noticed
        taken[name] = []
    for _ in range(WARM_UP + repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken[name].append(pipe.recv())
    for name, process in processes.items():
        pipes[name].send(False)
        process.join()
    check_losses({name: [loss for loss, _, _ in steps] for name, steps in taken.items()})
    wall, cpu = (
        {name: statistics.median(step[i] for step in steps[WARM_UP:]) for name, steps in taken.items()}
        for i in (1, 2)
    )
    tokens = int((batch_of(config)["kinds"] > 0).sum())
    result = {"tokens_per_s": tokens / wall["ours"]}
    for name in wall.keys() - {"ours"}:
        result[f"ratio_vs_torch_{name}"] = wall[name] / wall["ours"]
        result[f"ratio_vs_torch_{name}_cpu"] = cpu[name] / cpu["ours"]
    return result


def check_losses(losses: dict[str, list[float]]) -> None:
    """Raises ValueError where a contender's losses are not ours."""
    for name, values in losses.items():
        if not np.allclose(values, losses["ours"], rtol=TOLERANCE, atol=0):
            raise ValueError(f"losses differ: ours {losses['ours']}, {name} {values}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=turns.REPEATS)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if unknown := set(args.sizes) - set(SIZES):
        sys.exit(f"error: --sizes: {', '.join(sorted(unknown))} is not among {', '.join(SIZES)}")
    results: dict[str, dict[str, float]] = {}  # number -> size -> its value
    print(f"{'size':>6}{'parameters':>12}{'tokens/s':>10}{'vs eager':>10}{'compile':>10}   per CPU second")
    for size in args.sizes:
        config = config_of(size)
        found = measure(config, args.repeats)
        for name, value in found.items():
            results.setdefault(name, {})[size] = value
        ratios = [found[f"ratio_vs_torch_{name}{kind}"] for kind in ("", "_cpu") for name in CONTENDERS[1:]]
        by_clock_and_cpu = "{:>9.2f}x{:>9.2f}x{:>7.2f}x{:>7.2f}x".format(*ratios)
        print(f"{size:>6}{count(config):>12,}{found['tokens_per_s']:>10.0f}{by_clock_and_cpu}", flush=True)
    if args.json:
        print(json.dumps({"threads": torch.get_num_threads(), **results}))


def count(config: FrozenConfigDict) -> int:
    return params_lib.count(params_lib.abstract(objectives.build(config)))


if __name__ == "__main__":
    main()
