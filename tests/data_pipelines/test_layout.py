"""How images lie in the token table: recorded inputs and features of every family, rebuilt from grids."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipelines import schema
from data_pipelines.layout import CLASS_SLOT, LAYOUTS, ROW_SLOT, image_tokens
from tests import golden_files

CASES = {
    family: sorted((golden_files.ROOT / family).glob("case*.safetensors"))
    for family in ("neo", "solo", "eve", "evev2", "fuyu")
}
pytestmark = pytest.mark.golden


class Ids:
    """Special tokens of a recording by their names."""

    def __init__(self, ids: dict[str, int]):
        self.ids = ids

    def special_id(self, name: str) -> int:
        return self.ids[name]


def config(family: str) -> dict:
    return json.loads((golden_files.ROOT / family / "config.json").read_text())


def test_every_family_has_cases():
    assert all(CASES.values()), "no recordings found"


@pytest.mark.parametrize("path", CASES["neo"], ids=lambda path: path.stem)
def test_neo(path):
    case, ids = load_file(path), config("neo")
    context, start = ids["img_context_token_id"], ids["img_start_token_id"]
    tokens = case["input_ids"]
    begins = np.flatnonzero(tokens == start)
    assert len(begins) == len(case["grid_hw"])
    for begin, grid in zip(begins, case["grid_hw"], strict=True):
        rows, cols = (int(x) // 2 for x in grid)
        end = tokens[begin + rows * cols + 1]
        vocabulary = Ids({"<img>": start, "<IMG_CONTEXT>": context, "</img>": end})
        image = image_tokens(LAYOUTS["neo"], vocabulary, rows, cols, 1)
        np.testing.assert_array_equal(tokens[begin : begin + len(image.tokens)], image.tokens)
        inside = slice(begin + 1, begin + 1 + rows * cols)
        np.testing.assert_array_equal(case["h_index"][inside], image.patch_hw[:, 0])
        np.testing.assert_array_equal(case["w_index"][inside], image.patch_hw[:, 1])
        np.testing.assert_array_equal(image.grid > 0, image.kinds == schema.PATCH)


@pytest.mark.parametrize("path", CASES["solo"], ids=lambda path: path.stem)
def test_solo(path):
    case, special = load_file(path), config("solo")["special_token_ids"]
    vocabulary = Ids(
        {"<vision>": special["vision"], "</vision>": special["vision_end"]}
        | {"<vpatch>": special["vpatch"], "<vrow_sep>": special["vrow_sep"]}
    )
    found = 0
    for tokens, index in zip(case["in.input_ids"], case["in.vision_patch_indices"], strict=True):
        position = 0
        while (tokens[position:] == special["vision"]).any():
            begin = position + int(np.argmax(tokens[position:] == special["vision"]))
            end = begin + 1
            while tokens[end] in (special["vpatch"], special["vrow_sep"]):
                end += 1
            span = tokens[begin : end + 1]
            rows = 1 + int((span == special["vrow_sep"]).sum())
            cols = int((span == special["vpatch"]).sum()) // rows
            name = "solo_sft" if span[-1] == special["vision"] else "solo"
            image = image_tokens(LAYOUTS[name], vocabulary, rows, cols, 1)
            np.testing.assert_array_equal(span, image.tokens)
            own = index[begin : end + 1]
            np.testing.assert_array_equal(own >= 0, image.kinds == schema.PATCH)
            np.testing.assert_array_equal(own[own >= 0] - own[own >= 0][0], np.arange(rows * cols))
            kinds = np.where(span == special["vrow_sep"], schema.SEPARATOR, schema.PATCH)
            np.testing.assert_array_equal(image.kinds[1:-1], kinds[1:-1])
            assert set(image.kinds[[0, -1]]) == {schema.TEXT} and not image.grid[[0, -1]].any()
            position, found = end + 1, found + 1
    assert found


@pytest.mark.parametrize(
    "path",
    [path for family in ("eve", "evev2") for path in CASES[family]],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_eve(path):
    """Of the recorded features of each image, the class vector and the row vectors stand at our slots."""
    case, family = load_file(path), path.parent.name
    weights = load_file(path.parent / "weights.safetensors")
    features, first = ("pre_projector", "conv_chw") if family == "eve" else ("features", "conv1_chw")
    number = 0
    while f"out.image.{number}.{features}" in case:
        rows, cols = (size // 2 for size in case[f"out.image.{number}.{first}"].shape[1:])
        image = image_tokens(LAYOUTS[family], Ids({}), rows, cols, 1)
        recorded = case[f"out.image.{number}.{features}"]
        assert len(image.tokens) == len(recorded) and (image.grid == 1).all()
        is_mark = (recorded == weights["model.vision_tower.split_embedding"]).all(axis=1)
        slots = image.kinds == schema.SLOT
        np.testing.assert_array_equal(is_mark, slots & (image.tokens == ROW_SLOT))
        np.testing.assert_array_equal(np.flatnonzero(slots & (image.tokens == CLASS_SLOT)), [0])
        if family == "evev2":
            np.testing.assert_array_equal(recorded[0], weights["model.vision_tower.class_embedding"])
        np.testing.assert_array_equal(image.hw[is_mark], [(row, cols) for row in range(rows)])
        number += 1
    if family == "evev2" and number and len(case["in.input_ids"]) == 1:
        length = len(case["in.input_ids"][0]) - number
        images = sum(len(case[f"out.image.{i}.features"]) for i in range(number))
        assert case["out.visual_token_mask"].sum() == images
        assert case["out.visual_token_mask"].size == length + images


@pytest.mark.parametrize("path", CASES["fuyu"], ids=lambda path: path.stem)
def test_fuyu(path):
    case, recorded = load_file(path), config("fuyu")
    patch, newline = recorded["image_token_id"], recorded["image_newline_id"]
    vocabulary = Ids({"|SPEAKER|": patch, "|NEWLINE|": newline})
    found = 0
    for tokens in case["in.input_ids"]:
        lines = "".join("p" if t == patch else "\n" if t == newline else " " for t in tokens).split()
        for rows in np.split(np.array(lines), np.flatnonzero(np.diff([len(line) for line in lines])) + 1):
            cols = len(rows[0])
            image = image_tokens(LAYOUTS["fuyu"], vocabulary, len(rows), cols, 1)
            spelled = "".join({patch: "p", newline: "\n"}[t] for t in image.tokens)
            assert spelled == "".join(f"{line}\n" for line in rows)
            assert (image.kinds == np.where(image.tokens == newline, schema.SEPARATOR, schema.PATCH)).all()
            assert (image.grid == 1).all()
            found += len(image.patch_hw)
    assert found == sum(value.shape[1] for name, value in case.items() if name.startswith("in.image_patches"))


def test_tiles_follow_one_another_inside_the_markers():
    ids = Ids({"<img>": 7, "<IMG_CONTEXT>": 8, "</img>": 9})
    image = image_tokens(LAYOUTS["internvl"], ids, 2, 2, 3)
    np.testing.assert_array_equal(image.tokens, [7, *[8] * 12, 9])
    np.testing.assert_array_equal(image.grid, [0, *[1] * 4, *[2] * 4, *[3] * 4, 0])
    np.testing.assert_array_equal(image.patch_hw, [[0, 0], [0, 1], [1, 0], [1, 1]] * 3)


def test_sail_has_markers_but_no_rows():
    ids = Ids({"<vision>": 7, "<vpatch>": 8, "</vision>": 9})
    np.testing.assert_array_equal(
        image_tokens(LAYOUTS["sail"], ids, 2, 3, 1).tokens, [7, 8, 8, 8, 8, 8, 8, 9]
    )


def test_breen_has_queries_behind_the_image():
    ids = Ids({"<img>": 7, "<IMG_CONTEXT>": 8, "</img>": 9})
    image = image_tokens(LAYOUTS["breen"], ids, 1, 2, 1)
    np.testing.assert_array_equal(image.tokens, [7, 8, 8, *range(160), 9])
    np.testing.assert_array_equal(image.grid, [0, *[1] * 162, 0])
    kinds = [schema.TEXT, *[schema.PATCH] * 2, *[schema.SLOT] * 160, schema.TEXT]
    np.testing.assert_array_equal(image.kinds, kinds)
