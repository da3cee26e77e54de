"""From an image file to rows of patches.

`smart_resize` and the bicubic resize follow NEO exactly: a checkpoint sees the pixels it was trained on.
"""

import dataclasses
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_FILE_PIXELS = 100_000_000  # larger files are refused: decoding one would take over 400 MB
MAX_ASPECT_RATIO = 200
WHITE = (255, 255, 255)
ZOOM = 0.15  # augmentation: largest relative change of size, and with it the widest border


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as the model will see it: a grid of rows x cols tokens, and its pixels when asked for."""

    rows: int
    cols: int
    load_patches: Callable[[], np.ndarray]  # -> uint8 [rows * cols, patch_dim]


def open_image(data: bytes, name: str = "image") -> Image.Image:
    """Reads the header only. Raises DataError, naming the image, if it is not one or is too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not a readable image ({', '.join(FORMATS)}): {error}") from error
    if image.width * image.height > MAX_FILE_PIXELS:
        raise DataError(
            f"{name}: {image.width}x{image.height} pixels, more than {MAX_FILE_PIXELS}; shrink it first"
        )
    return image


def decode(data: bytes, name: str = "image") -> Image.Image:
    """Decodes an image file to RGBA, upright. Raises DataError naming the image."""
    image = open_image(data, name)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: convert() would clip instead of scaling
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        return image.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: the image is damaged or cut off: {error}") from error


def flatten(image: Image.Image, colour: tuple[int, int, int] = WHITE, border: int = 0) -> Image.Image:
    """Pastes an RGBA image on a background, with `border` pixels of it on each side. Returns RGB."""
    canvas = Image.new("RGB", (image.width + 2 * border, image.height + 2 * border), colour)
    canvas.paste(image, (border, border), image)
    return canvas


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the (height, width) to resize to: multiples of `factor`, area within the pixel budget.

    As in NEO the scale of both bounds comes from the original sizes, so growing to `min_pixels` rounds up and
    may end above `max_pixels`. Raises DataError for images more than 200 times as long as wide.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DataError(f"{width}x{height} pixels: more than {MAX_ASPECT_RATIO} times as long as wide")
    new_height = max(factor, factor * round(height / factor))
    new_width = max(factor, factor * round(width / factor))
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, factor * math.floor(height / scale / factor))
        new_width = max(factor, factor * math.floor(width / scale / factor))
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = factor * math.ceil(height * scale / factor)
        new_width = factor * math.ceil(width * scale / factor)
    return new_height, new_width


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Bicubic with antialiasing, as Pillow did before version 13: the rows' lengths first, then their number.

    Pillow clips to 8 bits between the two passes, and since version 13 it picks their order by cost.
    """
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_patches(pixels: np.ndarray, side: int) -> np.ndarray:
    """Cuts uint8 [h * side, w * side, 3] into [h * w, side * side * 3]; a row is (py, px, rgb)."""
    height, width, channels = pixels.shape
    h, w = height // side, width // side
    grid = pixels.reshape(h, side, w, side, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(h * w, side * side * channels)


def make_picture(
    data: bytes,
    *,
    side: int,
    min_pixels: int,
    max_pixels: int,
    name: str = "image",
    augment_seed: int | None = None,
) -> Picture:
    """Plans how an image file becomes tokens of `side` x `side` pixels; pixels are decoded when loaded.

    Args:
        data: the file's bytes.
        side: pixels per side of one token, patch_size * merge_size.
        min_pixels, max_pixels: budget after resizing.
        name: shown in errors.
        augment_seed: background colour and framing are drawn from it; None = white background, no change.
    """
    # EXIF may turn the image on its side; only then is the header's size not the final one.
    header = open_image(data, name)
    turned = header.getexif().get(0x0112, 1) in (5, 6, 7, 8) if header.format in ("JPEG", "PNG") else False
    height, width = (header.width, header.height) if turned else (header.height, header.width)
    try:
        height, width = smart_resize(height, width, side, min_pixels, max_pixels)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error

    def load_patches() -> np.ndarray:
        image = decode(data, name)
        if augment_seed is None:
            resized = resize(flatten(image), height, width)
        else:
            resized = _augment(image, height, width, augment_seed)
        return to_patches(np.asarray(resized), side)

    return Picture(height // side, width // side, load_patches)


def _augment(image: Image.Image, height: int, width: int, seed: int) -> Image.Image:
    """White or any background, each half of the time; a frame up to ZOOM smaller or larger, shifted."""
    rng = np.random.default_rng(seed)
    red, green, blue = WHITE if rng.random() < 0.5 else rng.integers(0, 256, 3).tolist()
    border = math.ceil(ZOOM * max(image.size))
    scale = rng.uniform(1 - ZOOM, 1 + ZOOM)
    left, top = (border + rng.uniform(*sorted((0.0, side * (1 - scale)))) for side in image.size)
    box = (left, top, left + scale * image.width, top + scale * image.height)
    return flatten(image, (red, green, blue), border).resize(
        (width, height), Image.Resampling.BICUBIC, box=box
    )
