"""From an img2dataset folder to a training run: by a build, and without one, with broken records in it."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from neo_jax import metrics
from neo_jax.errors import EXIT_OK, EXIT_USER_ERROR
from tests.data_pipelines import web

ROOT = Path(__file__).parents[2]
STEPS = 8

CONFIG = """
from configs import base, web

def get_config():
    c = web.get_config("tiny")
    c.model.num_layers, c.model.pre_buffer = 1, 0
    c.data.sources.photos = base.source("webdataset", {tars!r}, max_rejected=1.0)
    c.data.sources.again = base.source("webdataset", {tars!r}, max_rejected=1.0)
    c.data.tokenizer = {tokenizer!r}
    c.data.index_path = {index!r}
    c.data.window = 40
    c.stages = ("full",)
    c.stage.full.mixture = {{"photos": 1, "again": ((0, 0), (4, 2))}}
    c.stage.full.steps, c.stage.full.warmup_steps = 8, 2
    c.train.log_every, c.train.save_every, c.train.eval_every = 3, 2, 0
    return c
"""


@pytest.fixture
def config_file(tmp_path):
    bad = web.write_tars(tmp_path / "tars", shards=2, records=40)
    web.write_tokenizer(tmp_path / "tokenizer.json")
    names = {"tars": "tars", "tokenizer": "tokenizer.json", "index": "index"}
    (tmp_path / "config.py").write_text(CONFIG.format(**{k: str(tmp_path / v) for k, v in names.items()}))
    return tmp_path / "config.py", bad


def command(config, workdir, *overrides):
    return [sys.executable, "-m", "neo_jax.train", f"--config={config}", f"--workdir={workdir}", *overrides]


def run(argv):
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)


def logged(workdir):
    lines = metrics.read(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "perf"} for line in lines]


def newest(workdir):
    folder = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return ocp.load_checkpointables(folder)["state"], ocp.checkpointables_metadata(folder).custom_metadata


def test_broken_shards_train_and_a_killed_run_tells_the_same_rejects(config_file, tmp_path):
    config, bad = config_file
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = run(command(config, straight))
    assert result.returncode == EXIT_OK, result.stderr
    process = subprocess.Popen(command(config, killed), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not any((killed / "checkpoints" / str(step)).exists() for step in (4, 6)):
        assert process.poll() is None, "the run ended early"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(command(config, killed)).returncode == EXIT_OK
    assert logged(killed) == logged(straight)
    (state, record), (other_state, other_record) = newest(straight), newest(killed)
    assert record == other_record and set(record["loader"]) == {"identity", "lanes"}
    jax.tree.map(np.testing.assert_array_equal, state, other_state)

    told = [line["rejected"] for line in logged(straight)] + [record["rejected"]]
    shards = [counts for line in told for counts in line.get("photos", {}).values()]
    reasons = set(itertools.chain.from_iterable(shards))
    assert reasons == {"missing_image", "truncated", "empty_text"}
    assert sum(n for counts in shards for n in counts.values()) >= len(bad), "an epoch and more was read"


def test_too_many_rejects_stop_the_run_with_one_line(config_file, tmp_path):
    config, _ = config_file
    result = run(command(config, tmp_path / "run", "--config.data.sources.photos.max_rejected=0.001"))
    assert result.returncode == EXIT_USER_ERROR
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (
        "source photos: 2 of" in message and "max_rejected = 0.001" in message and ".tar, record" in message
    )
    assert "Traceback" not in result.stderr


def test_from_an_img2dataset_folder_to_a_run(tmp_path):
    """The README's three commands."""
    web.write_tars(tmp_path / "tars", shards=2, records=40)
    build = [sys.executable, "-m", "data_pipelines.build", "--recipe=keep", "--tokenizer=300", "--workers=1"]
    build += [f"--input=photos=webdataset:{tmp_path / 'tars'}", f"--output={tmp_path / 'data'}"]
    result = run(build)
    assert result.returncode == 0, result.stderr
    result = run([sys.executable, "-m", "data_pipelines.inspect", str(tmp_path / "data")])
    assert result.returncode == 0, result.stderr
    fields = {"data.path": tmp_path / "data", "stages": "full", "data.window": 40}
    fields |= {"stage.full.steps": 2, "stage.full.warmup_steps": 1, "data.max_rejected": 1.0}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    result = run(command("configs/web.py:tiny", tmp_path / "run", *overrides))
    assert result.returncode == EXIT_OK, result.stderr
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert newest(tmp_path / "run")[1]["data_hash"] == manifest["data_hash"]
