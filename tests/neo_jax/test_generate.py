"""Captions of a user's own files, and what the command says about files that are no images."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError
from neo_jax import generate, restore, workdir as workdir_lib
from neo_jax.errors import UserError


@pytest.fixture(scope="module")
def trained(smoke_workdir):
    return restore.load(smoke_workdir, workdir_lib.load_config(smoke_workdir))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of sizes and modes that the model never saw, and files that are no images."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (211, 333, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "odd.jpg")
    Image.new("RGBA", (64, 64), (20, 200, 30, 128)).save(folder / "clear.png")
    Image.new("L", (9, 700), 40).save(folder / "thin.webp")
    (folder / "text.png").write_text("hello\n")
    whole = (folder / "odd.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def run(workdir, capsys, *flags):
    generate.main([f"--workdir={workdir}", "--json", "--max_new_tokens=5", *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", ["odd.jpg", "clear.png", "thin.webp"])
def test_one_image(smoke_workdir, files, capsys, name):
    answer = run(smoke_workdir, capsys, f"--image={files / name}")
    assert answer["prompt"] == "en: "
    assert answer["step"] == 30
    assert isinstance(answer["caption"], str)


def test_prints_the_caption(smoke_workdir, files, capsys):
    image = f"--image={files / 'odd.jpg'}"
    caption = run(smoke_workdir, capsys, image)["caption"]
    generate.main([f"--workdir={smoke_workdir}", image, "--max_new_tokens=5"])
    assert capsys.readouterr().out == caption + "\n"


def test_several_images(smoke_workdir, files, capsys):
    names = [str(files / "clear.png"), str(files / "odd.jpg")]
    answer = run(smoke_workdir, capsys, *(f"--image={name}" for name in names), "--prompt=both: ")
    assert answer["images"] == names


def shown(trained, files, names, prompt):
    """The prompt's document, and its text with a mark in the place of each image."""
    document = generate.prompt_document(
        trained, [(files / name).read_bytes() for name in names], names, prompt
    )
    starts = np.flatnonzero(document.tokens == trained.tokenizer.image_start)
    ends = np.flatnonzero(document.tokens == trained.tokenizer.image_end) + 1
    borders = zip([0, *ends], [*starts, len(document.tokens)], strict=True)
    words = [trained.tokenizer.decode(document.tokens[start:end]) for start, end in borders]
    return "<image>".join(words), document


def test_images_stand_at_their_marks_in_order(trained, files):
    names = ["clear.png", "odd.jpg"]
    assert shown(trained, files, names, "en: ")[0] == "<image><image>en: "
    words, document = shown(trained, files, names, "see <image> and <image>: ")
    assert words == "see <image> and <image>: "
    first, second = (trained.picture((files / name).read_bytes(), name) for name in names)
    expected = np.concatenate([first.load_patches(), second.load_patches()])
    np.testing.assert_array_equal(document.load_patches(), expected)
    assert document.image_ids.max() == 2


def test_batching_changes_nothing(trained, files):
    names = ["clear.png", "odd.jpg", "thin.webp"]
    documents = [generate.prompt_document(trained, [(files / n).read_bytes()], [n], "en: ") for n in names]
    assert len({len(document.tokens) for document in documents}) > 1
    together = list(generate.generate(trained, documents, 6, batch_size=2))
    assert together == [next(generate.generate(trained, [document], 6)) for document in documents]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "not a readable image"),
        ("cut.jpg", "damaged"),
        ("none.png", "No such file"),
        ("", "directory"),
    ],
)
def test_files_that_are_no_images(smoke_workdir, files, name, message):
    with pytest.raises((UserError, DataError), match=message) as error:
        generate.main([f"--workdir={smoke_workdir}", f"--image={files / name}"])
    assert str(files / name) in str(error.value)


def test_other_bad_input(smoke_workdir, files, tmp_path):
    image = f"--image={files / 'clear.png'}"
    with pytest.raises(UserError, match="holds no run"):
        generate.main([f"--workdir={tmp_path}", image])
    with pytest.raises(UserError, match="--step=7"):
        generate.main([f"--workdir={smoke_workdir}", image, "--step=7"])
    with pytest.raises(UserError, match=r"--hf=.*no such folder"):
        generate.main([f"--hf={tmp_path / 'nowhere'}", image])
    with pytest.raises(UserError, match="--step: is of a run's checkpoints"):
        generate.main([f"--hf={tmp_path}", image, "--step=7"])
    with pytest.raises(UserError, match="--max_new_tokens=0"):
        generate.main([f"--workdir={smoke_workdir}", image, "--max_new_tokens=0"])
    with pytest.raises(DataError, match="1 pictures for 2 <image> markers"):
        generate.main([f"--workdir={smoke_workdir}", image, "--prompt=<image><image>"])


def test_a_mistake_is_one_line_and_exit_code_1(smoke_workdir, files):
    command = [sys.executable, "-m", "neo_jax.generate", f"--workdir={smoke_workdir}"]
    done = subprocess.run([*command, f"--image={files / 'text.png'}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "text.png: not a readable image" in line
