"""A build through Beam's portable Job API, which the runners of Flink and Spark speak too.

Three kinds of processes, as on a cluster: this one submits; a job server takes the pipeline and shuffles; its
workers do the work, and know nothing of this one but what it staged. The job server is Beam's own.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.build.__main__ import main
from tests.data_pipelines import web_corpus
from tests.data_pipelines.test_recipes import files

ROOT = Path(__file__).parents[2]
WORKER = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"

# Its own stage travels with the pipeline: no worker can import this file.
RECIPE = """
import dataclasses
from data_pipelines.build import recipes
from data_pipelines.errors import Reject

FORBIDDEN = "violin"

@dataclasses.dataclass(frozen=True)
class Without:
    word: str

    def __call__(self, example):
        if any(self.word in span.text for span in example.texts):
            raise Reject("text_length", f"has a {self.word}")
        return example

def get_recipe():
    web = recipes.web()
    stages = (Without(FORBIDDEN), *web.stages)
    return dataclasses.replace(web, stages=stages, tokenizer=400, num_shards=3, holdout=0.1)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Flags that send a pipeline to the job server."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "elsewhere").mkdir()
    port = folder / "port"
    command = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main"]
    command += [f"--port_file={port}", f"--staging_dir={folder / 'staged'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder / "elsewhere", env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    while not port.exists():
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    yield [
        "--runner=PortableRunner",
        f"--job_endpoint=localhost:{port.read_text()}",
        "--environment_type=beam:env:harness_subprocess_python:v1",
        f"--environment_config={WORKER}",
    ]
    server.terminate()
    server.wait()


def test_a_cluster_writes_what_the_local_runner_writes(cluster, tmp_path, monkeypatch):
    """Paths are relative to this process; the local runner is a pool, whose processes load the file too."""
    monkeypatch.chdir(tmp_path)
    web_corpus.write(tmp_path / "in")
    (tmp_path / "mine.py").write_text(RECIPE)
    arguments = ["--recipe=mine.py", "--input=web=webdataset:in"]
    assert main([*arguments, "--output=local", "--workers=2"]) == 0
    assert main([*arguments, "--output=beam", *cluster]) == 0
    assert files(tmp_path / "local") == files(tmp_path / "beam")
    rejects = "".join(path.read_text() for path in (tmp_path / "beam" / "rejects").iterdir())
    assert "has a violin" in rejects


@pytest.mark.slow
def test_what_fails_on_a_worker_is_told_in_one_line(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    web_corpus.write(tmp_path / "in")
    (tmp_path / "mine.py").write_text(RECIPE.replace("def __call__", "def call"))
    assert main(["--recipe=mine.py", "--input=web=webdataset:in", "--output=beam", *cluster]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "'Without' object is not callable" in line


def test_an_absent_job_server_is_told_in_one_line(tmp_path, capsys):
    web_corpus.write(tmp_path / "in")
    flags = ["--runner=PortableRunner", "--job_endpoint=localhost:1", "--job_server_timeout=1"]
    arguments = ["--recipe=web", f"--input=web=webdataset:{tmp_path / 'in'}", f"--output={tmp_path / 'beam'}"]
    assert main([*arguments, *flags, "--environment_type=LOOPBACK"]) == 1
    assert "error:" in capsys.readouterr().err.splitlines()[-1]
