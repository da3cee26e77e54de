"""The compiled resize equals Pillow's to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from data_pipelines import images, resample
from data_pipelines.resize import RESIZES, Resize
from tests.data_pipelines.web_corpus import picture

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
SIDES = st.integers(1, 150)


def by_pillow(pixels: np.ndarray, height: int, width: int, filter_: Image.Resampling) -> np.ndarray:
    """The width first, then the height."""
    image = Image.fromarray(pixels).resize((width, pixels.shape[0]), filter_)
    return np.asarray(image.resize((width, height), filter_))


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.tuples(SIDES, SIDES, SIDES, SIDES),
    filter_=st.sampled_from(FILTERS),
    extreme=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(sizes, filter_, extreme, seed):
    height, width, new_height, new_width = sizes
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    if extreme:  # sums beyond 0 and 255, which are clipped
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    out = np.empty((1, 1, new_height, new_width * 3), np.uint8)
    assert resample.compiled(pixels, out, filter_, width_first=True)
    expected = by_pillow(pixels, new_height, new_width, filter_)
    np.testing.assert_array_equal(out.reshape(new_height, new_width, 3), expected)


@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize(
    ("height", "width", "new_height", "new_width"),
    # Long runs, short ones, neither side, one side, to a third, to the fourfold.
    [
        (401, 613, 416, 608),
        (300, 700, 400, 1024),
        (96, 64, 96, 64),
        (96, 70, 96, 64),
        (900, 1000, 320, 320),
        (64, 80, 256, 320),
    ],
)
def test_photos_of_usual_sizes(filter_, height, width, new_height, new_width):
    pixels = picture(7, width, height)
    out = np.empty((1, 1, new_height, new_width * 3), np.uint8)
    assert resample.compiled(pixels, out, filter_, width_first=True)
    expected = by_pillow(pixels, new_height, new_width, filter_)
    np.testing.assert_array_equal(out.reshape(new_height, new_width, 3), expected)


def test_blocks_are_the_patches():
    pixels = picture(5, 130, 101)
    out = np.empty((3, 4, 32, 96), np.uint8)
    assert resample.compiled(pixels, out, Image.Resampling.BICUBIC, width_first=True)
    expected = images.to_patches(by_pillow(pixels, 96, 128, Image.Resampling.BICUBIC), 32)
    np.testing.assert_array_equal(out.reshape(12, -1), expected)


@pytest.mark.parametrize("rule", RESIZES)
def test_every_rule_gives_the_same_with_and_without(rule, monkeypatch):
    to = Resize(rule, 28, 64 * 64, 448 * 448, tile=112)
    pixels = picture(6, 310, 215)
    plan = to.plan(215, 310)
    found = images.cut(pixels, plan, to)
    monkeypatch.setattr(resample, "_kernels", lambda: None)
    np.testing.assert_array_equal(found, images.cut(pixels, plan, to))
    assert found.shape == (plan.num_grids * plan.rows * plan.cols, 28 * 28 * 3)


@pytest.mark.parametrize(
    ("shape", "filter_", "width_first"),
    [
        ((50, 50, 3), Image.Resampling.LANCZOS, True),
        ((50, 50, 3), Image.Resampling.BICUBIC, False),  # Pillow picks the order
    ],
)
def test_what_is_left_to_pillow(shape, filter_, width_first):
    out = np.full((1, 1, 32, 96), 7, np.uint8)
    assert not resample.compiled(np.zeros(shape, np.uint8), out, filter_, width_first)
    assert (out == 7).all()
