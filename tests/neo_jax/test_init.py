"""A trained model out to Hugging Face's layout, in again, and on from there: the same at every station."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from neo_jax import (
    config as config_lib,
    generate,
    mesh as mesh_lib,
    params as params_lib,
    restore,
    start,
    workdir as workdir_lib,
)
from neo_jax.convert.__main__ import main as convert
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def imported(smoke_workdir, tmp_path_factory):
    """The smoke run's model, exported and imported."""
    folder = tmp_path_factory.mktemp("imported")
    convert(["export", f"--workdir={smoke_workdir}", f"--out={folder / 'hf'}"])
    convert(["import", f"--hf={folder / 'hf'}", f"--out={folder / 'run'}"])
    return folder / "run"


@pytest.fixture(scope="module")
def trained(smoke_workdir):
    return restore.load(smoke_workdir, workdir_lib.load_config(smoke_workdir))


def test_imported_is_exported(trained, imported):
    back = restore.load(imported, workdir_lib.load_config(imported))
    jax.tree.map(np.testing.assert_array_equal, back.params, trained.params)
    free = ("model.embed.tile_size", "model.init_std", "model.remat_policy")  # shape no forward pass of NEO
    for difference in config_lib.diff(trained.config, back.config):
        assert not difference.startswith("model.") or difference.startswith(free), difference
    assert back.stage.config.max_pixels == trained.stage.config.max_pixels


def test_generate_from_imported(smoke_workdir, imported, tmp_path, capsys):
    """It needs neither the run nor its data, nor an import: the tokenizer came along."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    answers = []
    for model in (f"--workdir={smoke_workdir}", f"--workdir={imported}", f"--hf={imported.parent / 'hf'}"):
        flags = ["--json", "--max_new_tokens=8", "--prompt=en: ", f"--image={tmp_path / 'image.png'}"]
        generate.main([model, *flags])
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["caption"])
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("axes", [{"num_devices": 1}, {"num_devices": 4, "fsdp": 2, "tensor": 2}])
def test_start_from_imported(trained, imported, axes):
    """Every parameter is the imported one, where the mesh wants it."""
    c = ConfigDict(json.loads(config_lib.to_json(trained.config)))
    c.init = str(imported)
    c.mesh.update(axes)
    specs = params_lib.abstract(Transformer(c.model))
    sizes = [c.mesh[axis] for axis in mesh_lib.AXES]
    devices = np.reshape(jax.devices()[: c.mesh.num_devices], sizes)
    mesh = jax.sharding.Mesh(devices, mesh_lib.AXES)
    params = start.grown_params(c, mesh, specs)
    for path, sharding in mesh_lib.param_shardings(mesh, specs).items():
        np.testing.assert_array_equal(params[path], trained.params[path])
        assert params[path].sharding.is_equivalent_to(sharding, params[path].ndim)


def test_what_train_says(trained, imported, smoke_workdir, tmp_path):
    c = ConfigDict(json.loads(config_lib.to_json(trained.config)))
    c.init = str(tmp_path / "nowhere")
    mesh = trained.mesh
    specs = params_lib.abstract(Transformer(c.model))
    with pytest.raises(UserError, match=r"config.init: .*nowhere holds no run"):
        start.grown_params(c, mesh, specs)
    c.init = str(imported)
    c.model.mlp_size += 8
    with pytest.raises(UserError, match=r"config.init: .*mlp/\w+/weight has shape"):
        start.grown_params(c, mesh, params_lib.abstract(Transformer(c.model)))
    # A process of its own: in this one JAX is in use already.
    code = (
        "import pathlib, sys; from neo_jax import train, workdir; folder = pathlib.Path(sys.argv[1]); "
        "train.train(workdir.load_config(folder), folder)"
    )
    result = subprocess.run([sys.executable, "-c", code, imported], cwd=ROOT, capture_output=True, text=True)
    assert (
        f"holds a model, but no run; start one in another folder with --config.init={imported}"
        in result.stderr
    )


def test_first_steps_go_on_from_there(trained, imported, tmp_path):
    """The command starts from the imported parameters: frozen ones are still theirs after its steps."""
    name = trained.config.stages[0]
    fields = {
        "data.path": trained.config.data.path,
        "init": imported,
        "stages": name,
        f"stage.{name}.steps": 2,
        f"stage.{name}.warmup_steps": 1,
        "eval.splits": "",
    }
    command = [sys.executable, "-m", "neo_jax.train", f"--config={ROOT}/configs/quickstart.py:smoke"]
    command += [
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{key}={value}" for key, value in fields.items()),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"starts from {imported / 'checkpoints' / '0'}" in result.stdout
    after = restore.load(tmp_path / "run", workdir_lib.load_config(tmp_path / "run"))
    specs = params_lib.abstract(Transformer(trained.config.model))
    moves = params_lib.select(specs, trained.config.stage[name].trainable)
    assert moves and moves != set(specs)
    for path in specs:
        same = np.array_equal(after.params[path], trained.params[path])
        assert same == (path not in moves), path
