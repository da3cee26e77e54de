"""How long saving holds up training: the call itself, and steps taken while files are written.

    python -m benchmarks.checkpoint_stall [--json]

A model of 20 M parameters (240 MB of parameters and optimizer state) trains and saves every fourth step, as
neo_jax.train does. `stall` is the time that a save keeps the loop, in steps; `beside` is a step that runs
while a save is being written, in steps that run alone. The files go to a temporary folder.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

from ml_collections import FrozenConfigDict

from benchmarks import ours, rows, turns
from benchmarks.train_step import config_of
from neo_jax.checkpoint import Checkpoints


def measure(config: FrozenConfigDict, repeats: int = turns.REPEATS) -> dict[str, float]:
    """Medians over `repeats` saves: seconds of a step alone and beside a save, and of the call that saves."""
    stage = config.stage.full
    trainer = ours.Trainer(config)
    batch = trainer.put(rows.batch(config.model, stage.batch_size, stage.row_tokens, stage.row_patches))

    def step() -> float:
        start = time.perf_counter()
        trainer.step(batch)
        return time.perf_counter() - start

    step()
    times: dict[str, list[float]] = {"alone": [], "stall": [], "beside": []}
    with (
        tempfile.TemporaryDirectory(prefix="checkpoints-") as folder,
        Checkpoints(pathlib.Path(folder), keep=1) as checkpoints,
    ):
        for turn in range(repeats + 1):
            alone = min(step() for _ in range(3))
            start = time.perf_counter()
            checkpoints.save(turn + 1, trainer.state, {})
            stall = time.perf_counter() - start
            beside = step()
            checkpoints.wait()
            if turn:  # the first save makes folders and threads
                for name, spent in (("alone", alone), ("stall", stall), ("beside", beside)):
                    times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    r = measure(config_of("20M"))
    stall, beside = r["stall"] / r["alone"], r["beside"] / r["alone"]
    print(f"step {r['alone']:.3f} s; a save stalls the loop for {stall:.2f} steps; beside it {beside:.2f}x")
    if args.json:
        print(json.dumps({"checkpoint": r | {"stall_steps": stall, "beside_ratio": beside}}))


if __name__ == "__main__":
    main()
