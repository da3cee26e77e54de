"""Time from the command to the first step of a run, with nothing compiled before and with everything.

    python -m benchmarks.first_step [--config=configs/quickstart.py] [--json]

Starts `python -m neo_jax.train` in a fresh folder with an empty compilation cache, and again with the cache
that the first run left, and clocks its first logged step. The data is built before the clock starts.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from data_pipelines import build
from neo_jax import config as config_lib

REPEATS = 5
FLAGS = ("--config.train.log_every=1", "--config.eval.splits=()")


def run(config: str, cache: pathlib.Path, workdir: pathlib.Path, flags: tuple[str, ...] = ()) -> float:
    """Seconds until the first step is logged; the run ends after it.

    Raises:
        RuntimeError: the run fails before it.
    """
    command = [sys.executable, "-m", "neo_jax.train", f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, *FLAGS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("step 1/"):
                spent = time.perf_counter() - start
                process.terminate()  # saves and ends
                break
        process.communicate()
    if not said or not said[-1].startswith("step 1/"):
        raise RuntimeError(f"{' '.join(command)} ended before its first step:\n{''.join(said)}")
    return spent


def measure(config: str, repeats: int = REPEATS, flags: tuple[str, ...] = ()) -> dict[str, float]:
    """Median seconds to the first step, cold and warm by turns."""
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="first-step-") as folder:
            root = pathlib.Path(folder)
            for name, spent in times.items():
                spent.append(run(config, root / "cache", root / name, flags))
    return {name: statistics.median(spent) for name, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    build.ensure(config_lib.load(args.config).data)
    r = measure(args.config)
    print(f"first step after {r['cold']:.1f} s cold, {r['warm']:.1f} s warm")
    if args.json:
        print(json.dumps({"first_step": r}))


if __name__ == "__main__":
    main()
