"""Resizing pixels: Pillow's own arithmetic, or the same filters by a library of SIMD instructions.

    pillow   bit for bit what the published checkpoints were trained on; compiled (kernels.py) where numba is
             installed, five times as fast as Pillow itself
    simd     by cykooz-resizer; of the same accuracy (both round to 8 bits between the passes), but a value
             may differ by some levels of 255 from Pillow's; the faster one where pictures shrink a lot

A run that starts from scratch loses nothing by "simd"; one that continues a published checkpoint keeps
"pillow".
"""

import functools
import threading
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from data_pipelines.errors import DataError

RESAMPLERS = ("pillow", "simd")

_SIMD_FILTERS = {
    Resampling.BOX: "box",
    Resampling.BILINEAR: "bilinear",
    Resampling.BICUBIC: "catmull_rom",  # Pillow's, with a = -1/2
    Resampling.LANCZOS: "lanczos3",
}


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
    _kernels().resize(pixels, out, filter_ == Resampling.BICUBIC)
    return True


@functools.cache
def _kernels() -> Any:
    """The module of that name; None without numba, and in exported folders, which do not have it."""
    try:
        from data_pipelines import kernels
    except ImportError:
        return None
    return kernels


def simd(pixels: np.ndarray, height: int, width: int, filter_: Resampling) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [height, width, 3], antialiased. Raises DataError without cykooz-resizer."""
    if pixels.shape[:2] == (height, width):
        return pixels
    library, resizer = _resizer()
    source = library.ImageData(pixels.shape[1], pixels.shape[0], library.PixelType.U8x3, pixels.tobytes())
    target = library.ImageData(width, height, library.PixelType.U8x3)
    resizer.resize(source, target, _options(filter_))
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, 3)


_thread = threading.local()  # a resizer has buffers of its own


def _resizer() -> tuple[Any, Any]:
    library = _library()
    if not hasattr(_thread, "resizer"):
        _thread.resizer = library.Resizer()
    return library, _thread.resizer


@functools.cache
def _options(filter_: Resampling) -> Any:
    library = _library()
    kind = library.FilterType[_SIMD_FILTERS[filter_]]
    return library.ResizeOptions(resize_alg=library.ResizeAlg.convolution(kind))


@functools.cache
def _library() -> Any:
    try:
        import cykooz_resizer
    except ImportError as error:
        raise DataError(
            "the resampler \"simd\" needs cykooz-resizer: install the extra `simd` (pip install -e '.[simd]')"
        ) from error
    return cykooz_resizer
