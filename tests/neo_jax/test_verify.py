"""The verify command: right folders pass, wrong ones fail, and the card says what was compared."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from data_pipelines import text
from neo_jax import config as config_lib, params as params_lib
from neo_jax.convert import cases, import_, verify
from neo_jax.convert.__main__ import main
from neo_jax.convert.export import export
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from tests import golden_files
from tests.neo_jax import recordings
from tests.neo_jax.test_convert_backbones import saved

ROOT = Path(__file__).parents[2]
CASES = sorted((golden_files.ROOT / "neo").glob("case*.safetensors"))
# Of the other families, whose folders `verify` reads as they are: a case of every model that was recorded.
OTHERS = [
    ("solo", "packed"),
    ("solo", "sliding_window"),
    ("fuyu", "left_padded"),
    ("eve", "train_pal"),
    ("evev2", "padded_textonly"),
    ("evev2", "dense_stage0"),
    ("evev2", "shared_norms"),
]


@pytest.fixture
def neo_folder(golden_dir, tmp_path):
    folder = tmp_path / "neo"
    folder.mkdir()
    for name in ("config.json", "weights.safetensors"):
        shutil.copyfile(golden_dir("neo") / name, folder / name)
    return folder


def run(capsys, *flags):
    main(["verify", "--json", *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_recorded_cases(neo_folder, case, capsys):
    numbers = run(capsys, f"--hf={neo_folder}", f"--case={case}")
    assert numbers["max_abs_error"] < 1e-4 and numbers["mean_abs_error"] < 1e-5
    assert abs(numbers["kl"]) < 1e-9 and numbers["greedy_agreement"] == 1
    assert len(numbers["layers"]) == import_.Source(neo_folder).model.num_layers + 1
    assert max(numbers["layers"]) < 1e-4
    card = (neo_folder / verify.CARD).read_text()
    assert case.name in card and f"{len(load_file(case)['input_ids'])} positions" in card


@pytest.mark.parametrize(("family", "name"), OTHERS, ids=lambda part: part)
def test_recordings_of_every_family(golden_dir, family, name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "write_card", lambda *_: None)  # recordings stay as they are
    folder = golden_dir(family)
    case = next(path for path in recordings.cases(family) if name in path.name and path.parent == folder)
    main(["verify", f"--hf={folder}", f"--case={case}"])
    *lines, _, numbers = capsys.readouterr().out.splitlines()
    numbers = json.loads(numbers)
    assert numbers["max_abs_error"] < 1e-4 and numbers["mean_abs_error"] < 1e-5
    assert abs(numbers["kl"]) < 1e-9 and numbers["greedy_agreement"] == 1
    recorded = sum(tensor.startswith("out.hidden.") for tensor in load_file(case))
    assert len(numbers["layers"]) == len(lines) == recorded and max(numbers["layers"]) < 1e-4
    assert lines[0].startswith("largest error embeddings") and "final norm" in lines[-1]


def test_a_wrong_weight_fails(neo_folder, capsys):
    weights = load_file(neo_folder / "weights.safetensors")
    name = "vision_model.embeddings.patch_embedding.bias"
    save_file(weights | {name: weights[name] + 0.1}, neo_folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"a logit differs by .*, more than 0.0001"):
        run(capsys, f"--hf={neo_folder}", f"--case={CASES[0]}")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_abs_error"] > 1e-3


def test_token_tables_are_cases_of_any_family(neo_folder, tmp_path, capsys):
    """The batch of a recording, written as a token table, is the same case."""
    source = import_.Source(neo_folder)
    case = cases.load(CASES[0], source.hf, source.model)
    # save_file writes the memory of an array, whatever its strides.
    fields = {name: case.batch[name] for name in cases.TABLE} | {"logits": case.logits}
    tensors = {name: np.ascontiguousarray(x) for name, x in fields.items()}
    save_file(tensors, tmp_path / "table.safetensors")
    table = run(capsys, f"--hf={neo_folder}", f"--case={tmp_path / 'table.safetensors'}")
    recorded = run(capsys, f"--hf={neo_folder}", f"--case={CASES[0]}")
    assert table | {"layers": recorded["layers"]} == recorded


def test_against_transformers(tmp_path, capsys):
    model = saved(tmp_path / "hf", "Qwen3", head_dim=16, tie_word_embeddings=True)
    assert run(capsys, f"--hf={tmp_path / 'hf'}")["max_abs_error"] < 1e-4
    assert "PyTorch" in (tmp_path / "hf" / verify.CARD).read_text()
    with torch.no_grad():  # what transformers reads is not what we were given
        model.model.norm.weight += 0.1
    original = import_.Source(tmp_path / "hf")
    model.save_pretrained(tmp_path / "other")
    [theirs] = verify.torch_cases(import_.Source(tmp_path / "other"))
    assert verify.compare(verify.outputs(original, theirs.batch)[0], theirs.logits)["max_abs_error"] > 1e-3


def test_numbers():
    """By hand: two positions, three words, ours right but for one logit of the second position."""
    theirs = np.log([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4 - 1e-9]])
    ours = theirs.copy()
    ours[1, 2] += np.log(2)
    numbers = verify.compare(ours, theirs)
    q = np.array([0.2, 0.4, 0.8]) / 1.4
    np.testing.assert_allclose(
        numbers["kl"], (np.array([0.2, 0.4, 0.4]) * np.log([0.2, 0.4, 0.4] / q)).sum() / 2
    )
    np.testing.assert_allclose(numbers["max_abs_error"], np.log(2))
    np.testing.assert_allclose(numbers["mean_abs_error"], np.log(2) / 6)
    assert numbers["greedy_agreement"] == 0.5


def test_what_it_says(neo_folder, tmp_path, capsys):
    tensors = load_file(CASES[0])
    for change, message in [
        ({"logits": None}, "has no logits to compare with"),
        ({"seq_boundaries": None}, "neither a token table .* nor a recording of neo"),
        ({"grid_hw": None}, "a recording of neo without 'grid_hw'"),
        ({"pixel_values": tensors["pixel_values"] + 0.001}, "no whole numbers of 0..255"),
        (
            {"logits": tensors["logits"][:, :9].copy()},
            r"logits have shape \(1, \d+, 9\), not \(1, \d+, 320\)",
        ),
    ]:
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        save_file(changed, tmp_path / "case.safetensors")
        with pytest.raises(UserError, match=message):
            run(capsys, f"--hf={neo_folder}", f"--case={tmp_path / 'case.safetensors'}")
    with pytest.raises(UserError, match="No such file"):
        run(capsys, f"--hf={neo_folder}", f"--case={tmp_path / 'nothing.safetensors'}")
    with pytest.raises(UserError, match=r"transformers cannot load it .*try --case"):
        run(capsys, f"--hf={neo_folder}")


def test_exported_native_model(tmp_path, capsys):
    """Text and two images, through the folder's own processor and PyTorch code; of a model that routes."""
    config = config_lib.load(f"{ROOT}/configs/evev2_7b.py:tiny")
    assert config.model.route.visual_share
    specs = params_lib.abstract(Transformer(config.model))
    params = jax.device_get(params_lib.init(specs, jax.random.key(0)))
    vocabulary = text.train_tokenizer(["what is shown here? and here? " * 3], 300)
    (tmp_path / "tokenizer.json").write_text(vocabulary)
    tokenizer = text.Tokenizer(tmp_path / "tokenizer.json", config.data.special_tokens)
    stage = config.stage[config.stages[-1]]
    export(tmp_path / "hf", config, stage, params.__getitem__, tokenizer)
    pairs = verify.torch_cases(import_.Source(tmp_path / "hf"))
    assert [int(pair.batch["image_ids"].max()) for pair in pairs] == [0, 2]
    assert run(capsys, f"--hf={tmp_path / 'hf'}")["max_abs_error"] < 1e-4
