"""Resizing pixels as the published checkpoints saw them, to the bit: Pillow's arithmetic.

Compiled (kernels.py) where numba is installed, eight times as fast as Pillow itself, which does the rest.
"""

import functools
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Resampling


def pillow(
    image: Image.Image, height: int, width: int, filter_: Resampling, width_first: bool
) -> Image.Image:
    """Antialiased resize of an RGB or RGBA image.

    Pillow clips to 8 bits between its two passes. Before version 13, with which NEO was recorded, the rows'
    lengths came first (`width_first`); since then it is whichever order is cheaper.
    """
    if width_first and image.width != width and image.height != height:
        image = image.resize((width, image.height), filter_)
    return image.resize((width, height), filter_)


def compiled(pixels: np.ndarray, out: np.ndarray, filter_: Resampling, width_first: bool) -> bool:
    """Resizes as `pillow` does, to the bit, and cuts into blocks.

    Args:
        pixels: uint8 [h, w, 3].
        out: uint8 [rows, cols, y, x * 3], takes a picture of rows * y by cols * x pixels.

    Returns:
        False, and leaves `out` as it is, where only Pillow can: without numba, for another filter, or where
        it chooses the order of the two passes itself.
    """
    height, width, _ = pixels.shape
    one_pass = out.shape[0] * out.shape[2] == height or out.shape[1] * out.shape[3] == width * 3
    can = filter_ in (Resampling.BILINEAR, Resampling.BICUBIC) and (width_first or one_pass)
    if not can or _kernels() is None:
        return False
    # Pillow lends its pixels for reading only, which numba takes for another type.
    _kernels().resize(np.require(pixels, requirements=["C", "W"]), out, filter_ == Resampling.BICUBIC)
    return True


@functools.cache
def _kernels() -> Any:
    """The module of that name; None without numba, and in exported folders, which do not have it."""
    try:
        from data_pipelines import kernels
    except ImportError:
        return None
    return kernels
