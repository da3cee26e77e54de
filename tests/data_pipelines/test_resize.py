"""Every family's resize rule against the recorded tables and pixels, and what any rule must keep."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from safetensors.numpy import load_file

from data_pipelines import images
from data_pipelines.errors import Reject
from data_pipelines.resize import RESIZES, Resize, eve_band
from tests.data_pipelines.recorded import (
    Recording,
    as_uint8,
    assert_same_pixels,
    from_patches,
    png,
)


@pytest.fixture
def recording(golden_dir, tmp_path):
    return lambda family: Recording(golden_dir(family), tmp_path)


def decoded(pixels: np.ndarray, to: Resize) -> tuple[images.Picture, np.ndarray]:
    """(picture, its resized and padded pixels) of an image file."""
    picture = images.make_picture(png(pixels), to)
    return picture, from_patches(picture.load_patches(), picture.rows, picture.cols, to.side)


def test_neo_sizes(golden_dir):
    table = json.loads((golden_dir("neo") / "smart_resize.json").read_text())
    assert table["rows"]
    for height, width, min_pixels, max_pixels, expected in table["rows"]:
        to = Resize("neo", table["factor"], min_pixels, max_pixels)
        if expected is None:
            with pytest.raises(Reject, match="times as long as wide") as rejected:
                to.plan(height, width)
            assert rejected.value.reason == "aspect"
        else:
            plan = to.plan(height, width)
            assert (plan.height, plan.width) == tuple(expected), (height, width, min_pixels, max_pixels)


def test_neo_pixels(golden_dir):
    folder = golden_dir("neo")
    table = json.loads((folder / "smart_resize.json").read_text())
    golden = load_file(folder / "preprocess.safetensors")
    assert table["images"]
    for case in table["images"]:
        name = f"{case['setting']}.image{case['image']}"
        to = Resize("neo", table["factor"], case["min_pixels"], case["max_pixels"])
        picture, pixels = decoded(golden[f"image{case['image']}"], to)
        np.testing.assert_array_equal(pixels, golden[f"{name}.resized_uint8"], err_msg=name)
        assert (2 * picture.rows, 2 * picture.cols) == tuple(golden[f"{name}.grid_hw"][0])
        # The recorded rows are (channel, y, x) of half a token; their mean and deviation are in the README.
        h, w = 2 * picture.rows, 2 * picture.cols
        p = to.side // 2
        recorded = golden[f"{name}.pixel_values"].reshape(h, w, 3, p, p).transpose(0, 3, 1, 4, 2)
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        assert_same_pixels(pixels, recorded.reshape(h * p, w * p, 3), mean, std)


def test_solo(recording):
    golden = recording("solo")
    side = golden.config["config"]["vision_patch_size"]
    to = Resize("solo", side, 1, 1024**2)
    for size_in, size_out in zip(
        golden.preprocess["resize.wh_in"], golden.preprocess["resize.wh_out"], strict=True
    ):
        plan = to.plan(int(size_in[1]), int(size_in[0]))
        assert (plan.width, plan.height) == tuple(size_out), size_in
    for number, picture in enumerate(golden.pictures):
        recorded = golden.preprocess[f"img{number}.patches"]
        planned, pixels = decoded(picture, to)
        assert (planned.rows, planned.cols) == recorded.shape[:2]
        recorded = recorded.transpose(0, 3, 1, 4, 2).reshape(pixels.shape)
        assert_same_pixels(pixels, recorded, *golden.norm())


def test_eve_sizes(recording):
    golden = recording("eve").preprocess
    tables = [name for name in golden if name.startswith("size_rule.basehw_")]
    assert tables
    for name in tables:
        grid = tuple(int(number) for number in name.split("_")[-2:])
        for (width, height), expected in zip(golden["size_rule.wh_in"], golden[name], strict=True):
            assert eve_band(int(height), int(width), grid) == tuple(expected), (width, height)


def eve_canvas(picture: np.ndarray, size: int, grid: tuple[int, int], mean: np.ndarray) -> np.ndarray:
    """The recorded form, [size, size, 4]: our resized picture on the mean colour, and where it is."""
    ratio = size // grid[0]
    width, height, before, *_ = eve_band(*picture.shape[:2], grid)
    resized = images.resize(Image.fromarray(picture), height * ratio, width * ratio, "eve")
    canvas = np.zeros((size, size, 4), np.uint8)
    canvas[..., :3] = [int(255 * x) for x in mean]
    top, left = (before * ratio, 0) if picture.shape[1] > picture.shape[0] else (0, before * ratio)
    canvas[top : top + height * ratio, left : left + width * ratio, :3] = np.asarray(resized)
    canvas[top : top + height * ratio, left : left + width * ratio, 3] = 1
    return canvas


def test_eve_pixels(recording):
    golden = recording("eve")
    dims, (mean, std) = golden.config["dims"], golden.norm()
    # ratioR: the picture has R times as many tokens on a side as the teacher has patches.
    cases = {name: re.fullmatch(r"img(\d+)\.ratio(\d+)\.pixels_and_mask", name) for name in golden.preprocess}
    cases = {name: (int(match[1]), int(match[2])) for name, match in cases.items() if match}
    for name in golden.preprocess:
        if match := re.fullmatch(r"train\.plain\.(\d+)\.(teacher_)?pixels_and_mask", name):
            cases[name] = int(match[1]), 1
    assert len(cases) > 3
    for name, (number, ratio) in cases.items():
        recorded = golden.preprocess[name].transpose(1, 2, 0)
        size = recorded.shape[0]
        grid = (dims["image_size_clip"] // ratio, dims["patch_clip"])
        canvas = eve_canvas(golden.pictures[number], size, grid, mean)
        np.testing.assert_array_equal(canvas[..., 3], recorded[..., 3], err_msg=name)
        assert_same_pixels(canvas[..., :3], recorded[..., :3], mean, std)
        side = dims["patch"] * dims["conv"]
        if size == dims["image_size"]:  # what becomes tokens is the picture alone
            _, pixels = decoded(golden.pictures[number], Resize("eve", side, 1, size**2, grid=grid))
            np.testing.assert_array_equal(pixels.reshape(-1, 3), canvas[canvas[..., 3] == 1][:, :3])


def test_evev2(recording):
    golden = recording("evev2")
    dims, sizes = golden.config["dims"], golden.preprocess["size_rule.wh_in"]
    side = dims["patch"] * dims["dense"]
    tables = [name for name in golden.preprocess if name.startswith("size_rule.eval_")]
    assert tables
    for name in tables:
        to = Resize("evev2_eval", side, 1, int(name.rsplit("_", 1)[1]) ** 2)
        for (width, height), expected in zip(sizes, golden.preprocess[name], strict=True):
            plan = to.plan(int(height), int(width))
            assert (plan.width, plan.height) == tuple(expected), (name, width, height)
    for number, picture in enumerate(golden.pictures):
        for rule, name in (("evev2", f"train.plain.{number}"), ("evev2_eval", f"img{number}.eval")):
            _, pixels = decoded(picture, Resize(rule, side, 1, dims["max_size"] ** 2))
            assert_same_pixels(pixels, golden.preprocess[f"{name}.pixels"].transpose(1, 2, 0), *golden.norm())


def test_fuyu(recording):
    golden = recording("fuyu")
    dims = golden.config["dims"]
    canvas = tuple(dims["size"])
    to = Resize("fuyu", dims["patch"], 1, canvas[0] * canvas[1], canvas=canvas)
    assert len(golden.pictures) == len(golden.config["texts"])
    for number, picture in enumerate(golden.pictures):
        name = f"img{number}"
        plan = to.plan(*picture.shape[:2])
        assert (plan.height, plan.width) == tuple(golden.preprocess[f"{name}.unpadded_hw"])
        planned, pixels = decoded(picture, to)
        assert np.float32(planned.scale) == golden.preprocess[f"{name}.scale_factor"][0]
        recorded = golden.preprocess[f"{name}.patches"]  # flattened (y, x, channel), as ours
        assert recorded.shape == (planned.rows * planned.cols, to.side**2 * 3)
        recorded = from_patches(recorded, planned.rows, planned.cols, to.side)
        assert_same_pixels(pixels, recorded, np.full(3, 0.5), np.full(3, 0.5))
    padded = as_uint8(recorded, np.full(3, 0.5), np.full(3, 0.5))[plan.height :]
    assert not padded.size or (padded == 1).all()


def test_fuyu_keeps_the_shape_of_its_canvas_at_other_budgets():
    to = Resize("fuyu", 30, 1, 1080 * 1920)
    assert to.plan(2160, 3840)[:4] == (1080, 1920, 36, 64)
    assert to.plan(1080, 1921)[:2] == (1079, 1920)
    assert to.plan(31, 45)[:4] == (31, 45, 2, 2)  # never enlarged
    assert to.with_max_pixels(270 * 480).plan(2160, 3840)[:4] == (270, 480, 9, 16)


@pytest.mark.parametrize(
    ("height", "width", "most", "tiles"),
    # Shapes and counts from the dynamic tiling described in InternVL 1.5 (Chen et al. 2024, section 3.3).
    [
        (448, 448, 12, (1, 1)),
        (448, 896, 12, (1, 2)),
        (1344, 896, 6, (3, 2)),
        (800, 1333, 12, (2, 3)),
        (100, 1200, 12, (1, 12)),
        (900, 900, 4, (2, 2)),
        (500, 500, 4, (1, 1)),
        (3000, 3000, 12, (3, 3)),
    ],
)
def test_internvl_tiles(height, width, most, tiles):
    to = Resize("internvl", 28, 1, most * 448**2)
    plan = to.plan(height, width)
    assert plan.tiles == tiles
    assert (plan.height, plan.width) == (tiles[0] * 448, tiles[1] * 448)
    assert plan.num_grids == tiles[0] * tiles[1] + (tiles != (1, 1))
    assert (plan.rows, plan.cols) == (16, 16)
    assert to.most_tokens == (most + (most > 1)) * 256 >= plan.num_grids * 256


def test_tiles_are_pieces_of_the_resized_picture_and_the_thumbnail_is_all_of_it():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    to = Resize("internvl", 4, 1, 6 * 16**2, tile=16)
    picture = images.make_picture(png(pixels), to)
    assert picture.num_grids == 7
    tiles = picture.load_patches().reshape(7, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(7, 16, 16, 3)
    whole = np.asarray(Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC))
    for number in range(6):
        row, column = divmod(number, 3)
        np.testing.assert_array_equal(tiles[number], whole[row * 16 :, column * 16 :][:16, :16])
    thumbnail = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(tiles[6], thumbnail)


@given(
    rule=st.sampled_from(sorted(RESIZES)),
    height=st.integers(1, 5000),
    aspect=st.floats(1 / 150, 150),
    max_side=st.integers(2, 80),
)
def test_every_rule_makes_whole_tokens_within_its_budget(rule, height, aspect, max_side):
    width = max(1, round(height * aspect))
    if max(height, width) > 190 * min(height, width):
        return
    side = 28
    max_pixels = max((max_side * side) ** 2, 672**2 if rule == "eve" else 0)
    to = Resize(rule, side, 1, max_pixels, grid=(336, 14), tile=448)
    plan = to.plan(height, width)
    down, across = plan.tiles
    assert min(plan.rows, plan.cols, plan.height, plan.width) >= 1
    # What a grid lacks is less than a token, and only Fuyu pads at all.
    lacking = (down * plan.rows * side - plan.height, across * plan.cols * side - plan.width)
    assert all(0 <= x < side for x in lacking) and (rule == "fuyu" or lacking == (0, 0))
    area = plan.rows * plan.cols * down * across * side**2
    if rule in ("neo", "sail", "internvl") and min(plan.rows, plan.cols) > 1 and max_pixels >= 448**2:
        assert area <= max_pixels
    if rule in ("solo", "fuyu") and max_pixels >= 448**2:
        assert max(plan.height, plan.width) <= (max_side * side) * (16 / 9 if rule == "fuyu" else 1)
    if rule != "internvl" and min(plan.rows, plan.cols) > 1:  # slivers and tiles come in few sizes
        smaller = to.with_max_pixels(max_pixels // 4).plan(height, width)
        assert smaller.rows * smaller.cols <= plan.rows * plan.cols


@given(
    height=st.integers(1, 5000),
    aspect=st.floats(1 / 190, 190),
    factor=st.sampled_from([14, 28, 32]),
    max_side=st.integers(4, 64),
    share=st.floats(0.01, 1),
)
def test_neo_keeps_its_promises(height, aspect, factor, max_side, share):
    width = max(1, round(height * aspect))
    if max(height, width) > 200 * min(height, width):
        return
    max_pixels = (max_side * factor) ** 2
    min_pixels = int(max_pixels * share)
    plan = Resize("neo", factor, min_pixels, max_pixels).plan(height, width)
    new_height, new_width = plan.height, plan.width
    assert new_height % factor == new_width % factor == 0
    assert min(new_height, new_width) >= factor
    rounded = factor * round(height / factor), factor * round(width / factor)
    if rounded[0] * rounded[1] > max_pixels and min(new_height, new_width) > factor:
        assert new_height * new_width <= max_pixels
    if rounded[0] * rounded[1] < min_pixels:
        assert new_height * new_width >= min_pixels
    if height % factor == width % factor == 0 and min_pixels <= height * width <= max_pixels:
        assert (new_height, new_width) == (height, width)


def test_several_images_share_the_budget_of_two_in_neo():
    neo, evev2 = (Resize(rule, 32, 4096, 65536) for rule in ("neo", "evev2"))
    assert [neo.for_images(m).max_pixels for m in (0, 1, 2, 3, 8, 1000)] == [
        65536,
        65536,
        65536,
        43690,
        16384,
        4096,
    ]
    assert evev2.for_images(8) == evev2
