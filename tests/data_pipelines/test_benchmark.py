"""The benchmark does the same work in every contender, and counts rows as they are. It asserts no speed."""

import dataclasses
import json

import numpy as np
import pytest

from data_pipelines.benchmark import __main__ as command, packing, photos
from data_pipelines.benchmark.contenders import Job, by_pillow, by_simd, contenders
from data_pipelines.resize import Resize
from data_pipelines.schema import Document
from tests.data_pipelines.web_corpus import picture

KEYS = {"images_per_s", "rows_per_s", "ratio_vs_torch", "packing_efficiency"}  # fixed names


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEO_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = photos.folder(12)
        assert photos.folder(12) == folder
    return Job(folder, 2048, 2048, Resize("neo", 32, 256 * 256, 512 * 512))


def test_photos_are_of_the_promised_sizes_and_stay_the_same(job, tmp_path, monkeypatch):
    source = job.source()
    sizes = [job.rules().picture(source.example(i).images[0].data, "photo") for i in range(len(source))]
    assert len(sizes) == 12
    monkeypatch.setenv("NEO_JAX_CACHE", str(tmp_path))
    again = photos.folder(12)
    for path in job.folder.iterdir():
        if path.is_file():
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_every_contender_does_the_same_work(job):
    done = {name: run() for name, run in contenders(job)}
    assert {result.images for result in done.values()} == {12}
    # Ours also has the tokens around a picture and after the caption: <img>, </img>, <|im_end|>.
    assert done["ours"].tokens == done["torch"].tokens + 3 * 12
    assert done["ours"].rows > 0


@pytest.mark.parametrize(("height", "width"), [(96, 128), (64, 160), (300, 400), (240, 320)])
def test_the_simd_yardstick_resizes_as_pillow_does(job, height, width):
    pixels = picture(3, 320, 240)
    pillow, simd = (by(job)(pixels, height, width) for by in (by_pillow, by_simd))
    difference = np.abs(simd.astype(int) - pillow)
    assert simd.shape == pillow.shape and difference.max() <= 6 and difference.mean() < 0.3


def test_the_command_prints_the_fixed_keys(job, monkeypatch, capsys):
    monkeypatch.setenv("NEO_JAX_CACHE", str(job.folder.parent.parent))
    assert command.main(["--json", "--photos=12", "--alternations=1"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found.keys() >= KEYS
    assert all(found[key] > 0 for key in KEYS)
    assert found["packing"]["two_budgets"]["lost"] == 0


COLUMNS = ("tokens", "kinds", "image_ids", "targets", "loss_weights")


def documents(sizes: list[tuple[int, int]]) -> list[Document]:
    empty = np.zeros(0, np.int32)
    return [
        Document(
            str(i),
            **dict.fromkeys(
                ("tokens", "kinds", "image_ids", "targets", "loss_weights"), np.zeros(n, np.int32)
            ),
            coords=np.zeros((n, 3), np.float32),
            patch_hw=np.zeros((p, 2), np.int32),
            load_patches=lambda out=None: empty,
        )
        for i, (n, p) in enumerate(sizes)
    ]


def test_ways_to_pack_on_a_case_counted_by_hand():
    made = documents([(60, 50), (30, 20), (10, 8), (40, 0), (60, 40)])
    best = packing.two_budgets(made, 100, 100)
    assert (best.tokens, best.rows, best.lost) == (1.0, 2, 0)
    padded = packing.naive(made, 100, 100)
    assert padded.tokens == 200 / (5 * 60) and padded.patches == 118 / (5 * 50)
    dropped = packing.flatten_and_drop(made, 100, 100)
    assert (dropped.tokens, dropped.rows, dropped.lost) == (1.0, 1, 2)


def test_the_patch_budget_follows_the_data():
    rng = np.random.default_rng(0)
    patches, words = rng.integers(20, 200, 1500).tolist(), rng.integers(5, 150, 1500).tolist()
    sizes = [(p + t, p) for p, t in zip(patches, words, strict=True)]
    made = documents(sizes)
    budget = packing.patch_budget(made, 4096)
    share = sum(p for _, p in sizes) / sum(n for n, _ in sizes)
    assert share * 4096 <= budget < 4096 and budget % 128 == 0
    free, bound = (packing.two_budgets(made, 4096, patches).tokens for patches in (4096, budget))
    assert bound >= free - 0.002
    assert packing.two_budgets(made, 4096, budget - 256).tokens < free - 0.002, (
        "it is no larger than it must be"
    )
    text_only = [dataclasses.replace(document, patch_hw=np.zeros((0, 2), np.int32)) for document in made]
    assert packing.patch_budget(text_only, 4096) == 0
