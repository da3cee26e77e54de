"""The SIMD resize against exact arithmetic and Pillow."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images, resample
from data_pipelines.resize import Resize
from tests.data_pipelines.web_corpus import jpeg, picture


def _near(x: np.ndarray) -> np.ndarray:
    return (1.5 * x - 2.5) * x * x + 1


def _far(x: np.ndarray) -> np.ndarray:
    return ((2.5 - x / 2) * x - 4) * x + 2


KERNELS = {
    Image.Resampling.BILINEAR: (1.0, lambda x: np.clip(1 - x, 0, None)),
    Image.Resampling.BICUBIC: (2.0, lambda x: np.where(x < 1, _near(x), np.where(x < 2, _far(x), 0))),
}


def weights(size: int, new_size: int, filter_: Image.Resampling) -> np.ndarray:
    """float64 [new_size, size]: the antialiased filter, as Pillow's documentation describes it."""
    support, kernel = KERNELS[filter_]
    scale = max(size / new_size, 1.0)
    centres = (np.arange(new_size) + 0.5) * size / new_size
    distance = np.abs(np.arange(size)[None] + 0.5 - centres[:, None]) / scale
    found = np.where(distance < support, kernel(distance), 0.0)
    return found / found.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("filter_", KERNELS)
@pytest.mark.parametrize(("height", "width"), [(96, 128), (64, 160), (300, 400), (37, 51), (240, 320)])
def test_simd_is_as_accurate_as_pillow(filter_, height, width):
    pixels = picture(3, 320, 240)
    rows, columns = weights(240, height, filter_), weights(320, width, filter_)
    exact = np.einsum("hH,HWc,wW->hwc", rows, pixels.astype(float), columns, optimize=True).clip(0, 255)
    simd = resample.simd(pixels, height, width, filter_)
    pillow = np.asarray(resample.pillow(Image.fromarray(pixels), height, width, filter_, width_first=True))
    assert simd.dtype == np.uint8 and simd.shape == (height, width, 3)
    errors = [np.abs(found - exact) for found in (simd, pillow)]
    assert errors[0].max() < 2.5 and errors[0].mean() < errors[1].mean() + 0.05


def test_simd_patches_fall_into_place():
    """Through make_picture: the same grid, and pixels within a few levels of Pillow's."""
    data = jpeg(picture(4, 300, 200))
    found = {}
    for name in resample.RESAMPLERS:
        made = images.make_picture(data, Resize("neo", 32, 64 * 64, 128 * 128, resampler=name))
        found[name] = (made.rows, made.cols, made.load_patches().astype(int))
    assert found["simd"][:2] == found["pillow"][:2]
    difference = np.abs(found["simd"][2] - found["pillow"][2])
    assert difference.max() <= 6 and difference.mean() < 0.3
