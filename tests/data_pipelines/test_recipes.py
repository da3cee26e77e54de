"""Builds from raw shards: the same bytes on both engines and after a kill, and every record accounted for."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipelines import build, rows
from data_pipelines.build import inputs, recipes, run, statistics
from data_pipelines.build.__main__ import main
from data_pipelines.build.outputs import Rows
from data_pipelines.build.recipe import Recipe
from data_pipelines.build.store import Store
from data_pipelines.errors import DataError
from data_pipelines.records import from_bytes
from data_pipelines.resize import Resize
from tests.data_pipelines import web_corpus

ROOT = Path(__file__).parent.parent.parent
ROWS = Rows(256, 96, Resize("neo", 32, 64 * 64, 128 * 128), template="plain")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(folder of tars, id -> why the record must be left out, "" if it must not)."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, web_corpus.write(folder)


def source(corpus) -> inputs.Options:
    options = inputs.parse(f"web=webdataset:{corpus[0]}")
    return dataclasses.replace(options, index_path=str(corpus[0].parent / "index"))


def web(**changes) -> Recipe:
    return dataclasses.replace(recipes.web(), tokenizer=400, **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def records(folder: Path, manifest: dict) -> list[bytes]:
    found = []
    for shard in manifest["shards"]:
        reader = array_record_module.ArrayRecordReader(str(folder / shard["file"]))
        found += reader.read_all()
    return found


def rejected(folder: Path) -> dict[str, str]:
    """id -> reason, out of rejects/*.jsonl."""
    lines = [line for path in sorted((folder / "rejects").iterdir()) for line in path.open()]
    return {fields["id"]: fields["reason"] for fields in map(json.loads, lines)}


@pytest.mark.parametrize(
    "recipe",
    [
        web(num_shards=3, holdout=0.1),
        web(num_shards=2, output=ROWS),
        dataclasses.replace(recipes.keep(), tokenizer=300),
    ],
    ids=["documents", "rows", "keep"],
)
def test_both_engines_write_the_same_bytes_and_lose_nothing(corpus, tmp_path, recipe):
    manifest = run.run(recipe, [source(corpus)], str(tmp_path / "local"), workers=1)
    run.run(recipe, [source(corpus)], str(tmp_path / "beam"), runner="beam", flags=["--runner=DirectRunner"])
    assert files(tmp_path / "local") == files(tmp_path / "beam")

    out = rejected(tmp_path / "local")
    if recipe.output.form == "rows":
        written = [id_ for record in records(tmp_path / "local", manifest) for id_ in rows.ids(record)]
    else:
        written = [from_bytes(record).id for record in records(tmp_path / "local", manifest)]
    assert Counter(written + list(out)) == Counter(list(corpus[1])), (
        "each record is written or rejected, once"
    )
    if recipe.name == "web":
        assert out == {id_: fault for id_, fault in corpus[1].items() if fault}
    counted: Counter[str] = Counter()
    for shard in manifest["input"]:
        counted.update(shard["rejects"])
    assert counted == Counter(out.values()) == Counter(manifest["rejects"]["web"])
    assert sum(shard["records"] for shard in manifest["input"]) == len(corpus[1])
    assert set(manifest["counts"]) == set(recipe.splits)
    assert manifest["statistics"]["totals"]["documents"] == len(written)
    config = type("data", (), {"path": str(tmp_path / "local"), "recipe": ""} | dict.fromkeys(LEGACY))
    assert build.ensure(config) == manifest, "a reader accepts the folder"


LEGACY = ("locales", "image_size", "vocab_size")


def test_without_a_number_of_shards_each_holds_so_much_of_the_input(corpus, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipes.keep(), tokenizer=300)
    assert run.run(recipe, [source(corpus)], str(tmp_path / "one"), workers=1)["shards"][0]["records"] == 71
    size = sum(path.stat().st_size for path in corpus[0].iterdir())
    monkeypatch.setattr(run, "SHARD_BYTES", size // 2 - 1)
    run.run(recipe, [source(corpus)], str(tmp_path / "local"), workers=1)
    run.run(recipe, [source(corpus)], str(tmp_path / "beam"), runner="beam", flags=["--runner=DirectRunner"])
    given = dataclasses.replace(recipe, num_shards=3)
    run.run(given, [source(corpus)], str(tmp_path / "given"), workers=1)
    assert files(tmp_path / "local") == files(tmp_path / "beam") == files(tmp_path / "given")


def test_a_build_goes_on_with_the_number_of_shards_it_began_with(corpus, tmp_path, monkeypatch):
    recipe, output = dataclasses.replace(recipes.keep(), tokenizer=300), str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.delattr(run, "_manifest")
        with pytest.raises(NameError):
            run.run(recipe, [source(corpus)], output, workers=1)
    monkeypatch.setattr(inputs, "num_bytes", lambda _: 5 * run.SHARD_BYTES)  # of images that came since
    first = run.run(recipe, [source(corpus)], output, workers=1)
    assert len(first["shards"]) == 1
    assert run.run(recipe, [source(corpus)], output, workers=1) == first, "it is built already"


def test_the_order_depends_on_ids_and_seed_alone(corpus, tmp_path):
    """The same documents from three shards and from one come in the same order; another seed changes it."""
    recipe = dataclasses.replace(recipes.keep(), tokenizer=300)
    found = {}
    for shards in (3, 1):
        first = str(tmp_path / f"in{shards}")
        run.run(dataclasses.replace(recipe, num_shards=shards), [source(corpus)], first, workers=1)
        for seed in (0, 1):
            output = tmp_path / f"out{shards}-{seed}"
            again = inputs.parse(f"again=array_record:{first}/train")
            other = dataclasses.replace(recipe, seed=seed)
            manifest = run.run(other, [again], str(output), workers=1)
            found[shards, seed] = [from_bytes(record).id for record in records(output, manifest)]
    assert found[3, 0] == found[1, 0] != sorted(found[1, 0])
    assert found[3, 1] == found[1, 1] != found[1, 0]
    assert sorted(found[1, 1]) == sorted(found[1, 0])


def test_a_pool_writes_what_one_process_writes(corpus, tmp_path):
    recipe = web(num_shards=3, output=ROWS)
    for name, workers in (("one", 1), ("pool", 2)):
        run.run(recipe, [source(corpus)], str(tmp_path / name), workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "pool")


def test_a_finished_build_is_left_alone_and_others_are_refused(corpus, tmp_path, capsys):
    output = tmp_path / "out"
    first = run.run(web(), [source(corpus)], str(output), workers=1)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run.run(web(), [source(corpus)], str(output), workers=1) == first
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(DataError, match="holds other data than this recipe"):
        run.run(web(seed=3), [source(corpus)], str(output), workers=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty \(it has thesis\.txt\)"):
        run.run(web(), [source(corpus)], str(tmp_path / "mine"), workers=1)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_an_unfinished_build_is_not_continued_as_another(corpus, tmp_path):
    store = Store(str(tmp_path / "out"))
    store.write_json(".build/plan.json", {"recipe": {"name": "x"}, "input": {}})
    with pytest.raises(DataError, match="unfinished build with another recipe and input"):
        run.run(web(), [source(corpus)], store.url, workers=1)


# A stage that stops at one record for as long as a file is there, so that the kill hits where it should.
STOPPING = """
import dataclasses, pathlib, time
from data_pipelines.build import recipes
from data_pipelines.build.outputs import Examples, _ExampleWriting, tokenizer_of

STOP = pathlib.Path({stop!r})

def wait(where):
    while (STOP / where).exists():
        (STOP / "reached").touch()
        time.sleep(0.02)

@dataclasses.dataclass(frozen=True)
class Stop:
    def __call__(self, example):
        if example.id == "00002.tar#3":
            wait("reading")
        return example

class Writing(_ExampleWriting):
    def records(self, kept):
        for i, record in enumerate(super().records(kept)):
            if i == 3 and len(list(STOP.glob("wrote-*"))) >= 2:
                wait("writing")
            yield record
        (STOP / f"wrote-{{time.monotonic_ns()}}").touch()

@dataclasses.dataclass(frozen=True)
class Stopping(Examples):
    def start(self, tokenizer_json, sources):
        return Writing(tokenizer_of(tokenizer_json))

def get_recipe():
    web = recipes.web()
    changes = dict(stages=(Stop(), *web.stages), output=Stopping(), tokenizer=400, num_shards=4)
    return dataclasses.replace(web, **changes)
"""


@pytest.mark.parametrize("phase", ["reading", "writing"])
def test_a_killed_build_goes_on_where_it_was(corpus, tmp_path, phase):
    stop = tmp_path / "stop"
    stop.mkdir()
    recipe = tmp_path / "recipe.py"
    recipe.write_text(STOPPING.format(stop=str(stop)))

    flags = [f"--recipe={recipe}", f"--input=web=webdataset:{corpus[0]}", "--workers=1"]
    command = [sys.executable, "-m", "data_pipelines.build", *flags, f"--output={tmp_path / 'killed'}"]
    (stop / phase).touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    while not (stop / "reached").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    work = tmp_path / "killed" / ".build"
    done = [*work.glob("read/*.json"), *(tmp_path / "killed").glob("train/web-*")]
    assert len(list(work.glob("read/*.json"))) == (2 if phase == "reading" else 4)
    assert len(list((tmp_path / "killed").glob("train/web-*"))) == (0 if phase == "reading" else 2)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done if path.suffix != ".json"}

    (stop / phase).unlink()
    for path in stop.iterdir():
        path.unlink()
    for output in ("killed", "straight"):
        main([*flags, f"--output={tmp_path / output}"])
    assert files(tmp_path / "killed") == files(tmp_path / "straight")
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    assert len(list(stop.glob("wrote-*"))) == (8 if phase == "reading" else 6), (
        "finished shards are not redone"
    )


def test_beam_skips_finished_shards_and_writes_to_urls(corpus, tmp_path, monkeypatch):
    recipe = web(num_shards=3)
    run.run(recipe, [source(corpus)], str(tmp_path / "local"), workers=1)
    url = f"memory://{tmp_path.name}"

    def stop(*_):
        raise RuntimeError("the cluster is gone")

    with monkeypatch.context() as patch:
        patch.setattr(run, "_manifest", stop)
        with pytest.raises(RuntimeError, match="the cluster is gone"):
            run.run(recipe, [source(corpus)], url, runner="beam")
    system = fsspec.filesystem("memory")
    names = [name.removeprefix(f"/{tmp_path.name}/") for name in system.find(f"/{tmp_path.name}")]
    shards = [name for name in names if name.endswith(".array_record")]
    assert len(shards) == 3
    before = {name: system.modified(f"/{tmp_path.name}/{name}") for name in shards}
    run.run(recipe, [source(corpus)], url, runner="beam")
    assert {name: system.modified(f"/{tmp_path.name}/{name}") for name in shards} == before
    found = {
        name.removeprefix(f"/{tmp_path.name}/"): system.cat_file(name)
        for name in system.find(f"/{tmp_path.name}")
    }
    assert found == files(tmp_path / "local")


def test_a_shard_that_vanishes_is_an_error_that_names_it(corpus, tmp_path):
    folder = tmp_path / "in"
    web_corpus.write(folder)
    options = dataclasses.replace(
        inputs.parse(f"web=webdataset:{folder}"), index_path=str(tmp_path / "index")
    )
    shards = inputs.list_shards([options])
    (folder / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar"):
        list(shards[1].read())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe=slow", "--input=a=webdataset:x"], 1, "unknown recipe 'slow'"),
        (["--recipe=web"], 2, r"needs --input=[NAME=]KIND:PATH"),
        (["--recipe=web", "--input=/data"], 1, "write [NAME=]KIND:PATH"),
        (["--recipe=web", "--input=tar:/data"], 1, "KIND is one of array_record"),
        (["--recipe=web", "--input=webdataset:/no/such/folder"], 1, "/no/such/folder"),
        (["--recipe=web", "--input=webdataset:a", "--flink_master=x"], 2, "need --runner=beam"),
        (["--recipe=web", "--input=a=json:x", "--input=a=json:y"], 1, "two inputs have one name"),
        (["--recipe=web", "--input=a=json:x", "--output=memory://x"], 1, "local folder"),
        (["--recipe=nowhere.py", "--input=a=json:x"], 1, "nowhere.py: no such file"),
        (["--recipe=quickstart", "--input=a=json:x"], 2, "brings its own input"),
        (
            ["--recipe=web", "--input=a=json:x", "--workers=-3"],
            2,
            "--workers: must be a whole number, at least 1",
        ),
        (
            ["--recipe=web", "--input=a=json:x", "--workers=0"],
            2,
            "--workers: must be a whole number, at least 1",
        ),
        (
            ["--recipe=web", "--input=a=json:x", "--workers=two"],
            2,
            "--workers: must be a whole number, at least 1",
        ),
        (
            ["--recipe=web", "--input=a=json:x", "--num_shards=0"],
            2,
            "--num_shards: must be a whole number, at least 1",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, arguments, code, message):
    try:
        found = main([f"--output={tmp_path / 'out'}", *arguments])
    except SystemExit as exit_:
        found = exit_.code
    assert found == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_recipe_files_and_their_mistakes(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from data_pipelines.build.recipe import Recipe\ndef get_recipe():\n    return Recipe('mine')\n"
    )
    assert recipes.get(str(path)) == Recipe("mine")
    path.write_text("x = 1\n")
    with pytest.raises(DataError, match=r"mine\.py: must define get_recipe"):
        recipes.get(str(path))
    with pytest.raises(DataError, match="num_shards"):
        Recipe("none", num_shards=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nx = (\n", "line 2: SyntaxError: '(' was never closed"),
        ("import nowhere\n", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1\nx + ''\n", "line 2: TypeError: unsupported operand"),
        ("def {function}(arg=''):\n    return {{}}['key']\n", "line 2: KeyError: 'key'"),
    ],
)
def test_mistakes_in_files_are_told_with_their_line(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    for flag, function in (("--recipe=broken.py", "get_recipe"), ("--pack=broken.py:arg", "get_config")):
        Path("broken.py").write_text(text.format(function=function))
        assert main(["--recipe=web", "--input=a=json:x", "--output=out", flag]) == 1
        assert capsys.readouterr().err.startswith(f"error: broken.py: {message}")
    if "KeyError" not in message:
        assert not any("broken" in module.__name__ for module in recipes.modules()), "no worker loads it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.py: no such file"),
        ("x = 1\n", "config.py: has no function get_config()"),
        ("get_config = dict\n", "config.py: not a config, or it has no stage full"),
    ],
)
def test_files_that_are_no_config(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("config.py").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        Rows.from_config_file("config.py", "full")


@pytest.mark.parametrize("output", ["/proc/none", "file/below", "file/far/below", "file"])
def test_an_output_that_cannot_be_is_told_in_one_line(corpus, tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["--recipe=keep", f"--input=webdataset:{corpus[0]}", f"--output={output}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "cannot write " in error and output in error


def test_descriptions_of_recipes_are_json_and_tell_them_apart():
    described = [
        json.dumps(r.describe(), sort_keys=True) for r in (recipes.web(), recipes.keep(), web(output=ROWS))
    ]
    assert len(set(described)) == 3
    assert json.loads(described[0])["stages"][1]["kind"] == "TextLength"


def test_statistics_of_parts_add_up():
    rng = np.random.default_rng(0)
    values = [*rng.integers(0, 5000, 300).tolist(), 0, 1, 2, 4096]
    whole, parts = statistics.Statistics(), [statistics.Statistics() for _ in range(3)]
    for i, value in enumerate(values):
        for one in (whole, parts[i % 3]):
            one.observe("tokens", value)
            one.count("documents")
    found = statistics.add_up([part.to_json() for part in parts])
    assert found == whole.to_json()
    assert json.loads(json.dumps(found)) == found
    for bin_, number in found["histograms"]["tokens"].items():
        low, high = statistics.bin_edges(bin_)
        inside = [v for v in values if (low <= v < high or abs(v - low) < 1e-6) and abs(v - high) > 1e-6]
        assert number == (values.count(0) if bin_ == "zero" else len(inside)), bin_
