"""The inspection page of small data folders, opened in a real browser, and its numbers."""

import base64
import dataclasses
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from data_pipelines import rows
from data_pipelines.build import inputs, recipes, run
from data_pipelines.build.outputs import Rows
from data_pipelines.inspect import __main__ as inspect_main, read as read_lib
from data_pipelines.resize import Resize
from neo_jax.model import mask
from tests import browser
from tests.data_pipelines import web_corpus

ROWS = Rows(256, 96, Resize("neo", 32, 64 * 64, 128 * 128), template="plain")
HOSTILE = "<script>throw 'x'</script> & \"quotes\" <img src=x> in a caption of seven words"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of packed rows, with one hostile caption, and one of documents."""
    base = tmp_path_factory.mktemp("inspect")
    hostile = {"jpg": web_corpus.jpeg(web_corpus.picture(999)), "txt": HOSTILE.encode()}
    web_corpus.write(base / "in", extra=[("", hostile)])
    options = dataclasses.replace(
        inputs.parse(f"web=webdataset:{base / 'in'}"), index_path=str(base / "index")
    )
    recipe = dataclasses.replace(recipes.web(), tokenizer=400)
    for name, output in (("rows", ROWS), ("documents", recipe.output)):
        run.run(dataclasses.replace(recipe, output=output), [options], str(base / name), workers=1)
    return {name: base / name for name in ("rows", "documents")}


@pytest.mark.parametrize("form", ["rows", "documents"])
@pytest.mark.parametrize("width", [1200, 500])
def test_page_works_in_a_browser(folders, tmp_path, form, width):
    out = tmp_path / "page.html"
    assert inspect_main.main([str(folders[form]), f"--out={out}", "--rows=20"]) == 0
    found = browser.probe(out.read_text(), tmp_path, width)
    assert found["errors"] == []
    assert found["outside"] == []
    assert found["overflow"] <= 0
    assert all(alt and size for alt, size in found["images"])
    pictures = [alt for alt, _ in found["images"] if alt.startswith("Image ")]
    assert len(pictures) == 62, "every image of the corpus, once"
    assert sum(alt.startswith("Attention mask") for alt, _ in found["images"]) == out.read_text().count(
        '"mask"'
    )


def test_page_shows_the_rejects_and_escapes_captions(folders, tmp_path):
    out = tmp_path / "page.html"
    assert inspect_main.main([str(folders["rows"]), f"--out={out}", "--rows=20"]) == 0
    page = out.read_text()
    for reason in ("similar_text", "duplicate_image", "truncated", "bad_json"):
        assert f"<code>{reason}</code>" in page
    assert "<script>throw" not in page and "<img src=x" not in page
    manifest = json.loads((folders["rows"] / "manifest.json").read_text())
    assert f"{sum(manifest['counts']['train'].values())} documents" in page


def test_pictures_are_rebuilt_from_the_patches(folders, tmp_path):
    """A picture of the page equals the row's image file, decoded and resized by Pillow alone."""
    out = tmp_path / "page.html"
    assert inspect_main.main([str(folders["rows"]), f"--out={out}", "--rows=20"]) == 0
    pngs = re.findall(r'src="data:image/png;base64,([^"]+)" alt="Image 1 of the row', out.read_text())
    manifest = json.loads((folders["rows"] / "manifest.json").read_text())
    files = []
    for shard in manifest["shards"]:
        reader = array_record_module.ArrayRecordReader(str(folders["rows"] / shard["file"]))
        files += [msgpack.unpackb(record)[4][0][0] for record in reader.read_all()]
    assert len(pngs) == len(files) > 5
    for png, file in zip(pngs, files, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
        original = Image.open(io.BytesIO(file)).convert("RGB")
        height, width, _ = pixels.shape
        expected = original.resize((width, original.height), Image.Resampling.BICUBIC)
        expected = expected.resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_json_adds_up(folders):
    command = [sys.executable, "-m", "data_pipelines.inspect", str(folders["rows"]), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.strip().splitlines()[-1])
    tokens = patches = documents = 0
    for path in (folders["rows"] / "train").iterdir():
        reader = array_record_module.ArrayRecordReader(str(path))
        for record in reader.read_all():
            row = rows.from_record(record, ROWS.shape)
            tokens += int((row["segment_ids"] > 0).sum())
            patches += int((row["patch_index"] >= 0).sum())
            documents += len(rows.ids(record))
    num_rows = found["packing"]["rows"]
    assert found["packing"]["tokens_used"] == tokens / (num_rows * 256)
    assert found["packing"]["patches_used"] == patches / (num_rows * 96)
    assert found["statistics"]["totals"]["documents"] == documents == sum(found["counts"]["train"].values())
    assert sum(found["statistics"]["histograms"]["tokens"].values()) == documents
    assert sum(found["rejects"]["web"].values()) + documents == sum(s["records"] for s in found["input"])


@pytest.mark.parametrize("kind", read_lib.MASKS)
def test_intervals_are_those_of_the_model(folders, kind):
    for row in read_lib.read(folders["rows"], num_rows=3).rows:
        expected = mask.MASKS[kind]({name: jnp.asarray(array)[None] for name, array in row.items()})
        for found, wanted in zip(read_lib.intervals(row, kind), expected, strict=True):
            np.testing.assert_array_equal(found, np.asarray(wanted)[0])


def test_the_quickstart_and_configs(quickstart_data, tmp_path, capsys):
    folder = quickstart_data.data.path
    assert inspect_main.main([folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["form"] == "drawings" and found["packing"]["basis"].startswith("a sample of 256 documents")
    config = Path(__file__).parent.parent.parent / "configs" / "quickstart.py"
    out = tmp_path / "page.html"
    assert inspect_main.main([folder, f"--config={config}", "--stage=align", f"--out={out}", "--rows=1"]) == 0
    assert "of 192 tokens per row used" in out.read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "(it has no manifest.json)"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "not a manifest of format"),
        (lambda folder: os.truncate(next((folder / "train").iterdir()), 100), "has 100 bytes instead of"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: cannot be read"),
    ],
)
def test_what_is_damaged_is_said_in_one_line(folders, tmp_path, capsys, damage, message):
    shutil.copytree(folders["rows"], tmp_path / "copy")
    damage(tmp_path / "copy")
    assert inspect_main.main([str(tmp_path / "copy")]) == 1
    error = capsys.readouterr().err
    assert message in html.unescape(error) and error.count("\n") == 1
    assert not (tmp_path / "copy" / "inspect.html").exists()
