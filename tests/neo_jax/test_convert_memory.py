"""Conversion of a checkpoint of more than a gigabyte takes at most twice its largest tensor of memory."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import base
from neo_jax import params as params_lib
from neo_jax.convert import backbones, files
from neo_jax.model.transformer import Transformer

ROOT = pathlib.Path(__file__).parents[2]
# Run in a process of its own. Anonymous memory is what is not mapped from files; warm-up loads all code.
MEASURE = """
import json, pathlib, sys, threading, time
from neo_jax.convert import files, import_, ours, table
from neo_jax import workdir

def anonymous():
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def peak(work):
    base = highest = anonymous()
    done = threading.Event()
    def watch():
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return highest - base

def export(source, run, out):
    out.mkdir()
    [checkpoint] = (run / "checkpoints").iterdir()
    load = ours.loader(checkpoint)
    files.write_folder(out, list(source.family.table(source.model)), load, max_shard=300_000_000)

small, large, trained, out = map(pathlib.Path, sys.argv[1:])
export(import_.run(small, out / "small"), out / "small", out / "small_hf")
imported = peak(lambda: import_.run(large, out / "large"))
source = import_.Source(large)
exported = peak(lambda: export(source, out / "large", out / "large_hf"))
exported_trained = peak(lambda: export(source, trained, out / "trained_hf"))
print(json.dumps({"import": imported, "export": exported, "export of a trained run": exported_trained}))
"""
# A checkpoint as training writes it: the whole state at once, in OCDBT.
TRAIN = """
import pathlib, sys
import jax.numpy as jnp
from neo_jax import params as params_lib, stages, step
from neo_jax.checkpoint import Checkpoints
from neo_jax.convert import import_

source = import_.Source(pathlib.Path(sys.argv[1]))
stage = stages.plan(import_.imported_config(source))[0]
params = {path: jnp.asarray(source.load(path)) for path in source.specs}
trainable = params_lib.select(source.specs, ("norm/.*",))
state = step.initial_state(params, source.specs, stage, trainable)
with Checkpoints(pathlib.Path(sys.argv[2]) / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, state, {"data_hash": None})
"""


def random_checkpoint(folder, **sizes):
    """A plain Qwen3 with random weights, in shards; returns the sizes in bytes of our parameters."""
    model = base.model()
    model.update_from_flattened_dict({"coords.kind": "1d", "embed.kind": "none", "pre_buffer": 0, **sizes})
    folder.mkdir()
    config = backbones.BACKBONES["qwen3"].hf_config(model, {}, 0, 0)
    (folder / "config.json").write_text(json.dumps(config))
    specs = params_lib.abstract(Transformer(model))
    rng = np.random.default_rng(0)

    def load(path):
        return rng.standard_normal(specs[path].shape, np.float32)

    rows = list(backbones.BACKBONES["qwen3"].table(model))
    files.write_folder(folder, rows, load, max_shard=300_000_000)
    return {path: 4 * int(np.prod(spec.shape)) for path, spec in specs.items()}


def run(code, *arguments):
    """The last line that a process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return (result.stdout.splitlines() or [""])[-1]


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """Stacked parameters count as the tensors that they are. The bytes come back as they went."""
    random_checkpoint(tmp_path / "small")
    sizes = random_checkpoint(
        tmp_path / "large",
        hidden_size=1024,
        mlp_size=4096,
        num_layers=12,
        num_heads=16,
        num_kv_heads=8,
        vocab_size=49152,
    )
    assert sum(sizes.values()) > 1e9
    (tmp_path / "out").mkdir()
    run(TRAIN, tmp_path / "large", tmp_path / "trained")
    peaks = json.loads(run(MEASURE, *(tmp_path / name for name in ("small", "large", "trained", "out"))))
    assert len(peaks) == 3
    print(peaks, max(sizes.values()))
    for name, peak in peaks.items():
        assert peak <= 2 * max(sizes.values()), f"{name}: {peak:,} bytes above the mapped files"
    for file in sorted((tmp_path / "large").glob("*.safetensors*")):
        for exported in ("large_hf", "trained_hf"):
            assert file.read_bytes() == (tmp_path / "out" / exported / file.name).read_bytes()
