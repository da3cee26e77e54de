"""Building and guarding a data folder: caches, shards, manifests, and what goes wrong with them."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_pipelines import build, images, loader
from data_pipelines.build import packages, quickstart, render, shards, sources
from data_pipelines.build.packages import Package
from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError
from data_pipelines.sources import Options, open_source

SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="4" height="8" fill="red"/></svg>'
)


def make_tarball(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_drawing(i: int) -> Drawing:
    return Drawing(
        f"noto/{i:04x}", "noto", f"{i:04x}", bytes([i % 256]) * 50, {"en": (f"number {i}", ("n",))}
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that a fake registry serves, and an empty cache."""
    origin = tmp_path / "origin.tgz"
    make_tarball(origin, {"a.svg": SVG, "folder/b.txt": b"text"})
    monkeypatch.setenv("NEO_JAX_CACHE", str(tmp_path / "cache"))
    pinned = Package("@scope/drawings", "1.0.0", packages.integrity(origin))

    def npm_pack(package, folder):
        shutil.copy(origin, Path(folder) / package.file_name)

    monkeypatch.setattr(packages, "_npm_pack", npm_pack)
    return pinned


def test_package_is_fetched_once(package, monkeypatch):
    assert packages.read_files(package) == {"a.svg": SVG, "folder/b.txt": b"text"}
    monkeypatch.setattr(packages, "_npm_pack", lambda *_: pytest.fail("fetched again"))
    assert packages.fetch(package) == packages.cache_dir() / "npm" / "scope-drawings-1.0.0.tgz"


def test_damaged_cache_is_fetched_again(package, capsys):
    path = packages.fetch(package)
    path.write_bytes(path.read_bytes()[:100])
    assert packages.integrity(packages.fetch(package)) == package.integrity
    assert f"{path}: damaged" in capsys.readouterr().err


def test_wrong_package_is_refused(package):
    other = Package(package.name, package.version, "sha512-other")
    with pytest.raises(DataError, match=r"@scope/drawings@1\.0\.0: the fetched file is not the pinned one"):
        packages.fetch(other)
    assert not (packages.cache_dir() / "npm" / package.file_name).exists()


def test_failing_npm_names_package_and_command(tmp_path, monkeypatch):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NEO_JAX_CACHE", str(tmp_path / "cache"))
    package = Package("@scope/drawings", "1.0.0", "sha512-x")
    with pytest.raises(DataError, match=r"`npm pack @scope/drawings@1\.0\.0`: no network"):
        packages.fetch(package)


def test_unwritable_cache(package, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEO_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot store @scope/drawings@1\.0\.0 in the cache"):
        packages.fetch(package)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NEO_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/neo_jax"),
        ({"HOME": "/c"}, "/c/.cache/neo_jax"),
    ],
)
def test_cache_dir(monkeypatch, variables, expected):
    for name in ("NEO_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert packages.cache_dir() == Path(expected)


def test_iconify_follows_aliases():
    icons = {
        "width": 8,
        "height": 8,
        "icons": {"apple": {"body": "<rect/>"}},
        "aliases": {"fruit": {"parent": "pomme"}, "pomme": {"parent": "apple"}},
    }
    files = {"icons.json": json.dumps(icons).encode(), "chars.json": b'{"1f34e-fe0f": "fruit"}'}
    assert b'viewBox="0 0 8 8"><rect/></svg>' in sources._iconify(files)["1f34e"]


def test_render_svg_and_bitmap():
    image, svg_hash = render.render("a", SVG, 16)
    pixels = np.asarray(images.decode(image))
    assert pixels.shape == (16, 16, 4)
    assert pixels[0, 0].tolist() == [255, 0, 0, 255]
    assert pixels[0, -1].tolist() == [0, 0, 0, 0]
    again, bitmap_hash = render.render("b", image, 16)
    assert (again, bitmap_hash) == (image, svg_hash)
    with pytest.raises(DataError, match="a: cannot render"):
        render.render("a", b"<svg>", 16)


def test_render_ignores_colours_that_nobody_sees():
    pixels = np.zeros((2, 16, 16, 4), np.uint8)
    pixels[1, ..., 0] = 200
    files = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    assert render.render("a", files[0], 16) == render.render("b", files[1], 16)


def test_shards_are_deterministic_and_described(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 40)
    drawings = [make_drawing(i) for i in range(100)]
    entries = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        entries.append(shards.write(tmp_path / name, "train", "noto", drawings))
    assert entries[0] == entries[1]
    assert [entry["file"] for entry in entries[0]] == [
        f"train/noto-0000{i}-of-00003.array_record" for i in range(3)
    ]
    assert [entry["records"] for entry in entries[0]] == [40, 40, 20]
    shards.check(tmp_path / "a", entries[0], contents=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, 1000), "has 1000 bytes instead of"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "damaged"),
    ],
)
def test_damaged_shard_is_named(tmp_path, damage, message):
    entries = shards.write(tmp_path, "train", "noto", [make_drawing(i) for i in range(100)])
    path = tmp_path / entries[0]["file"]
    damage(path)
    with pytest.raises(DataError, match=rf"{path}.*{message}.*delete the folder"):
        shards.check(tmp_path, entries, contents=True)


def test_damage_that_sizes_do_not_show_is_found_when_its_record_is_read(tmp_path):
    """A flipped bit is an error that names the file, or is in what fills its blocks up."""
    (entry,) = shards.write(tmp_path, "train", "noto", [make_drawing(i) for i in range(20)])
    path = tmp_path / entry["file"]
    whole, errors = path.read_bytes(), []

    def records() -> list[bytes]:
        source = open_source(Options("noto", "array_record", str(path)))
        return [source[i] for i in range(len(source))]

    stored = records()
    for place in range(100, len(whole), 197):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        shards.check(tmp_path, [entry])
        try:
            assert records() == stored
        except DataError as error:
            errors.append(str(error))
    assert errors and all(str(path) in error for error in errors)


@pytest.fixture
def small_recipe(monkeypatch):
    """The quickstart recipe on a few drawings of our own, rendered in this process."""
    drawings = {f"{0x1F600 + i:x}": SVG.replace(b"red", b"#%02x8040" % i) for i in range(120)}
    styles = {
        name: sources.Style(Package(name, "1", "sha512-x"), lambda files: files, "MIT", "test")
        for name in ("noto", "twemoji")
    }
    turned = {key: svg.replace(b"rect ", b'rect y="2" ') for key, svg in drawings.items()}
    turned["1f600"] = drawings["1f600"]  # looks the same in both styles
    files = {"noto": drawings, "twemoji": turned | {"ffff": SVG}}
    monkeypatch.setattr(quickstart, "STYLES", styles)
    monkeypatch.setattr(quickstart, "read_files", lambda package: files[package.name])
    captions = {key: {"en": (f"drawing {key}", ("square", "red"))} for key in drawings}
    monkeypatch.setattr(quickstart, "read_captions", lambda locales: captions)
    monkeypatch.setattr(
        quickstart, "render_all", lambda pairs, size: (render.render(*pair, size) for pair in pairs)
    )


def data_config(path: Path, **changes) -> SimpleNamespace:
    fields = {"recipe": "quickstart", "locales": ("en",), "image_size": 32, "vocab_size": 300}
    fields |= {"sources": {}, "special_tokens": (), "max_rejected": 0.0}
    return SimpleNamespace(path=str(path), index_path=str(path), **(fields | changes))


def test_build_is_deterministic_and_complete(small_recipe, tmp_path):
    first = build.ensure(data_config(tmp_path / "a"))
    second = build.ensure(data_config(tmp_path / "b"))
    assert first == second
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert {str(f) for f in files} == {
        "manifest.json",
        "tokenizer.json",
        *(s["file"] for s in first["shards"]),
    }
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert first["dropped"] == {"no_caption": 1, "same_pixels": 1}
    assert sum(sum(counts.values()) for counts in first["counts"].values()) == 239
    assert first["credits"]["noto"] == {"licence": "MIT", "credit": "test"}
    assert list(tmp_path.glob(".*")) == [], "no temporary folders are left"
    assert build.ensure(data_config(tmp_path / "a")) == first, "an intact folder is reused"


def test_other_parameters_are_refused(small_recipe, tmp_path):
    build.ensure(data_config(tmp_path / "a"))
    with pytest.raises(DataError, match=r"image_size: built 32, wanted 64.*config\.data\.path"):
        build.ensure(data_config(tmp_path / "a", image_size=64))
    assert build.ensure(data_config(tmp_path / "a", image_size=64, recipe=""))["image_hw"] == [32, 32]


def test_truncated_shard_stops_the_reader(small_recipe, tmp_path):
    manifest = build.ensure(data_config(tmp_path / "a"))
    path = tmp_path / "a" / manifest["shards"][0]["file"]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=path.name):
        loader.read_drawings(SimpleNamespace(data=data_config(tmp_path / "a")), "train")


@pytest.mark.parametrize("content", ["", "[1, 2", "{}", "[]"])
def test_bad_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: .*if data_pipelines\.build wrote its folder"):
        build.ensure(data_config(tmp_path, recipe=""))


def test_a_folder_without_manifest_is_not_said_to_be_ours(tmp_path):
    (tmp_path / "00000.tar").touch()
    for read in (
        build.read_manifest,
        lambda folder: build.ensure(data_config(folder, recipe="")),
        lambda folder: build.ensure(data_config(folder)),
    ):
        with pytest.raises(DataError) as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value) and "delete" not in str(caught.value)
    with pytest.raises(DataError, match=r"not a folder that data_pipelines.*\(it has no manifest\.json\)"):
        build.read_manifest(tmp_path)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        build.read_manifest(tmp_path / "nowhere")


def test_nothing_there_and_nothing_to_build(tmp_path):
    with pytest.raises(DataError, match=r"config\.data\.path: .*a: no such folder, and config\.data\.recipe"):
        build.ensure(data_config(tmp_path / "a", recipe=""))
    with pytest.raises(DataError, match="unknown recipe 'slowstart'"):
        build.ensure(data_config(tmp_path / "a", recipe="slowstart"))


def test_foreign_folder_is_left_alone(small_recipe, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        build.ensure(data_config(tmp_path / "a"))
    assert (tmp_path / "a" / "thesis.txt").read_text() == "mine"


def test_unwritable_output(small_recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*file/a"):
        build.ensure(data_config(tmp_path / "file" / "a"))


def test_full_disk_leaves_nothing_behind(small_recipe, tmp_path, monkeypatch):
    """ArrayRecord reports a full disk as RuntimeError when a shard is closed."""

    class FullDisk:
        def __init__(self, path, options):
            Path(path).write_bytes(b"begun")

        def write(self, record):
            pass

        def close(self):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(shards.array_record_module, "ArrayRecordWriter", FullDisk)
    with pytest.raises(DataError, match=r"cannot write .*No space left on device"):
        build.ensure(data_config(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []


def test_command_reports_errors_in_one_line(tmp_path):
    command = [sys.executable, "-m", "data_pipelines.build", "--recipe=quickstart", f"--output={tmp_path}"]
    (tmp_path / "file").touch()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    unknown = subprocess.run(
        [*command[:3], "--recipe=slow", "--output=x"], capture_output=True, text=True, check=False
    )
    assert unknown.returncode == 2
