"""Evaluation: the metrics on cases done by hand, likelihoods against full forwards, and the command."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from data_pipelines import images, pack, text
from data_pipelines.documents import resize_from_config
from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError
from neo_jax import evaluate, params as params_lib, restore, workdir as workdir_lib
from neo_jax.errors import UserError

KEYS = {
    "loss",
    "retrieval_r1",
    "retrieval_r5",
    "retrieval_r1_shuffled",
    "num_candidates",
    "exact_match",
    "tag_f1",
}


def drawing_of(id_, label):
    return Drawing(id_, id_.split("/")[0], id_.split("/")[1], b"", {"en": (label, ())})


# Metrics


def test_retrieval_by_hand():
    scores = np.full((3, 7), -9.0)
    scores[0, 0] = -1.0  # best
    scores[1, 1], scores[1, 4], scores[1, 5] = -3.0, -1.0, -2.0  # third
    scores[2, 2] = -10.0  # last
    assert evaluate.right_ranks(scores).tolist() == [0, 2, 6]
    found = evaluate.retrieval(scores)
    assert found["retrieval_r1"] == pytest.approx(1 / 3)
    assert found["retrieval_r5"] == pytest.approx(2 / 3)
    assert found["num_candidates"] == 7


def test_shuffled_control_pairs_every_image_with_the_caption_before():
    found = evaluate.retrieval(np.eye(4))
    assert (found["retrieval_r1"], found["retrieval_r1_shuffled"]) == (1.0, 0.0)
    # Every image is said to be what the one before it is.
    found = evaluate.retrieval(np.roll(np.eye(4), 1, axis=0))
    assert (found["retrieval_r1"], found["retrieval_r1_shuffled"]) == (0.0, 1.0)


@pytest.mark.parametrize("constant", [0.0, -math.inf, math.nan])
def test_scores_that_say_nothing_find_nothing(constant):
    found = evaluate.retrieval(np.full((8, 8), constant))
    assert found["retrieval_r1"] == found["retrieval_r5"] == found["retrieval_r1_shuffled"] == 0.0


@pytest.mark.parametrize(
    ("found", "right", "f1"),
    [
        ([], [], 1.0),
        (["a"], [], 0.0),
        ([], ["a"], 0.0),
        (["a", "b"], ["b", "a"], 1.0),
        (["a", "b"], ["b", "c"], 0.5),
        (["a", "a", "a"], ["a"], 1.0),
        (["a"], ["a", "b", "c"], 0.5),
    ],
)
def test_set_f1(found, right, f1):
    assert evaluate.set_f1(found, right) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("label", "tags"), [("red apple", ["fruit", "red"]), ("flag: Benin", ["BJ"]), ("sun", []), ("", [])]
)
def test_parse_caption_undoes_caption_pieces(label, tags):
    assert evaluate.parse_caption("".join(text.caption_pieces(label, tags))) == (label, tags)


def test_parse_caption_of_anything():
    assert evaluate.parse_caption("no end of line, here") == ("no end of line, here", [])
    assert evaluate.parse_caption("a\nb,, c ,\n") == ("a", ["b", "c"])


def test_caption_quality():
    samples = [
        {"label": "sun", "tags": ["hot", "sky"], "generated": "sun\nhot, sky"},
        {"label": "moon", "tags": ["sky"], "generated": "sun\nhot, sky, day"},
    ]
    assert evaluate.caption_quality(samples) == {"exact_match": 0.5, "tag_f1": pytest.approx(0.75)}
    assert evaluate.caption_quality([]) == {"exact_match": 0.0, "tag_f1": 0.0}


# Which images and captions


def test_a_label_is_asked_once():
    drawings = [
        drawing_of("a/1", "sun"),
        drawing_of("b/1", "sun"),
        drawing_of("a/2", "moon"),
        drawing_of("a/3", "star"),
    ]
    assert [e.id for e in evaluate.distinct_labels(drawings, "en", 2)] == ["a/1", "a/2"]


def test_filling_adds_only_other_labels():
    assert evaluate.fill_up(["a", "b"], ["b", "c", "c", "d", "e"], 4) == ["a", "b", "c", "d"]
    assert evaluate.fill_up(["a", "b"], ["b"], 4) == ["a", "b"]


# On a trained model


@pytest.fixture(scope="module")
def workdir(smoke_workdir, tmp_path_factory):
    """A copy of a trained workdir, to write into."""
    return shutil.copytree(smoke_workdir, tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture(scope="module")
def trained(workdir):
    return restore.load(workdir, workdir_lib.load_config(workdir))


def test_candidate_scores_equal_full_forwards(trained):
    """Through real images, tokenizer, sorting by length, padding and groups."""
    drawings = evaluate.read_captioned(trained.config, "dev", "en")[:3]
    lines = [f"{e.captions['en'][0]}\n" for e in evaluate.read_captioned(trained.config, "dev", "en")[:11]]
    found = evaluate.candidate_scores(trained, evaluate.prompts(trained, drawings, "en"), lines, "test")
    assert found.shape == (3, 11)

    model = params_lib.bind(trained.model, trained.params)
    to = resize_from_config(trained.config, trained.stage.config)
    documents = [
        text.caption_document(
            trained.tokenizer,
            images.make_picture(e.image, to),
            "en",
            line.removesuffix("\n"),
            (),
        )
        for e in drawings
        for line in lines
    ]
    num_tokens = max(len(document.tokens) for document in documents)
    num_patches = len(documents[0].patch_hw)
    batch = pack.stack(
        [[d] for d in documents], len(documents), num_tokens, num_patches, trained.token_side**2 * 3
    )
    log_p = jax.nn.log_softmax(jax.jit(lambda batch: model.logits(model(batch)))(batch))
    picked = np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], axis=-1)[..., 0]
    counted = (batch["loss_weights"] > 0) & (batch["targets"] != trained.tokenizer.im_end)
    expected = (picked * counted).sum(axis=1).reshape(3, 11)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def run(workdir, capsys, *flags):
    """Runs the command on little data; the JSON object in its last line."""
    small = [
        "--config.eval.num_candidates=150",
        "--config.eval.num_generate=5",
        "--config.eval.max_new_tokens=4",
    ]
    evaluate.main([f"--workdir={workdir}", "--json", *small, *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_command(workdir, capsys):
    printed = run(workdir, capsys, "--split=val_concept")
    assert printed["step"] == 30
    numbers = printed["val_concept"]
    assert numbers.keys() == KEYS
    # The split has fewer labels than that: filled up from the training captions.
    assert numbers["num_candidates"] == 150
    assert 0 < numbers["loss"] < 9
    assert 0 <= numbers["retrieval_r1"] <= numbers["retrieval_r5"] <= 1
    assert json.loads((workdir / "eval.json").read_text()) == printed
    samples = json.loads((workdir / "samples.json").read_text())["val_concept"]
    assert len(samples) == 5
    assert all(s.keys() == {"id", "source", "label", "tags", "generated"} for s in samples)

    # Another split of the same checkpoint is added.
    both = run(workdir, capsys, "--split=dev")
    assert both.keys() == {"step", "config_hash", "dev"}
    assert json.loads((workdir / "eval.json").read_text()) == printed | both
    assert json.loads((workdir / "samples.json").read_text()).keys() == {"val_concept", "dev"}


def test_numbers_of_another_checkpoint_are_dropped(tmp_path):
    evaluate.write_results(tmp_path, {"step": 1, "config_hash": "x"}, {"dev": {"loss": 2.0}}, {"dev": []})
    evaluate.write_results(tmp_path, {"step": 2, "config_hash": "x"}, {"other": {"loss": 1.0}}, {"other": []})
    assert json.loads((tmp_path / "eval.json").read_text()) == {
        "step": 2,
        "config_hash": "x",
        "other": {"loss": 1.0},
    }
    assert json.loads((tmp_path / "samples.json").read_text()) == {"other": []}
    assert {path.name for path in tmp_path.iterdir()} == {"eval.json", "samples.json"}


def test_bad_input(workdir, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        evaluate.main([f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match=r"--step=7: .* has checkpoints of steps .*30"):
        evaluate.main([f"--workdir={workdir}", "--step=7"])
    with pytest.raises(DataError, match="nowhere"):
        evaluate.main([f"--workdir={workdir}", "--split=nowhere"])
    with pytest.raises(UserError, match="cannot load checkpoint"):
        evaluate.main([f"--workdir={workdir}", "--config.model.hidden_size=32"])


def test_workdir_before_its_first_checkpoint(workdir, tmp_path):
    shutil.copy(workdir / "config.json", tmp_path)
    with pytest.raises(UserError, match="no checkpoint yet"):
        evaluate.main([f"--workdir={tmp_path}"])


def test_damaged_checkpoint(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    for path in (copy / "checkpoints" / "30").rglob("d/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot load checkpoint .*/30"):
        evaluate.main([f"--workdir={copy}"])
