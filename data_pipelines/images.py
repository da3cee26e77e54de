"""From an image file to rows of patches.

Sizes come from the header and follow the family's rule (resize.py); pixels are decoded when asked for.
Decoding and resizing equal what the families did to the pixel: a checkpoint sees what it was trained on.
"""

import contextlib
import dataclasses
import io
import math
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipelines.errors import Reject
from data_pipelines.resample import compiled, pillow
from data_pipelines.resize import RESIZES, Plan, Resize
from data_pipelines.schema import LoadPatches

try:
    import simplejpeg
except ImportError:  # exported folders work without: Pillow gives the same pixels
    simplejpeg = None

# Pillow warns of metadata that it skips, a line per file. What counts is whether a file has pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")

WHITE = (255, 255, 255)
ZOOM = 0.15  # augmentation: largest relative change of size, and with it the widest border
_ORIENTATION = 0x0112  # EXIF tag
# Values of the tag -> how to turn the pixels upright (EXIF 2.3, section 4.6.4).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is decoded at all; beyond it an image is rejected by its header."""

    max_pixels: int = 100_000_000  # decoding more would take over 400 MB
    max_bytes: int = 100_000_000
    min_side: int = 1  # pixels
    max_aspect: float = 200.0  # longer side / shorter side


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as the model will see it: grids of rows x cols tokens, and its pixels when asked for."""

    rows: int
    cols: int
    load_patches: LoadPatches  # num_grids * rows * cols of them
    num_grids: int = 1  # tiles, where the family cuts pictures into tiles
    scale: float = 1.0  # height after resizing / height of the file


def sniff(data: bytes) -> str:
    """Returns the format the bytes begin like ("JPEG", ...; Pillow's names), "" for none we read."""
    head = data[:12]
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return "AVIF" if _AVIF_BRANDS & _brands(data) else ""
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


def _brands(data: bytes) -> set[bytes]:
    """The brand of a file of boxes, and those it is compatible with (ISO 14496-12, 4.3)."""
    end = min(int.from_bytes(data[:4], "big"), len(data), 1024)  # no file has hundreds of them
    return {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}


_AVIF_BRANDS = {b"avif", b"avis"}
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_DECLARED = {name.lower() for name in FORMATS} | {"jpg", "jpe", "jfif", "tif"}  # names of files, mime types


def check_declared(data: bytes, declared: str) -> None:
    """Raises Reject("wrong_mime") if bytes named "cat.jpg", "png", "image/webp", ... begin like no image.

    That is a page or a message stored in an image's place. A PNG under the name of a JPEG is shown all the
    same, and names of no image format promise nothing.
    """
    kind = re.split(r"[./]", declared.lower())[-1].removeprefix("x-")
    if kind in _DECLARED and not sniff(data):
        raise Reject("wrong_mime", f"declared as {declared}, but the bytes are no known image")


class Header(NamedTuple):
    """What a file tells before its pixels are decoded."""

    kind: str  # its format
    height: int  # of the upright picture
    width: int
    orientation: int  # EXIF, 1 = upright as stored
    plain: bool  # a JPEG in colour without EXIF: decoded by the quickest way


def read_header(data: bytes, name: str = "image", limits: Limits = DEFAULT_LIMITS) -> Header:
    """Reads the header only. Raises Reject, naming the image, if it is not one or beyond the limits."""
    kind = sniff(data)
    quick = simplejpeg is not None and kind == "JPEG" and len(data) <= limits.max_bytes
    if quick and not _may_have_exif(data):
        with contextlib.suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width, name, limits)
            return Header(kind, height, width, 1, plain=colours in ("YCbCr", "RGB"))
    image = open_image(data, name, limits)
    orientation = _orientation(image)
    height, width = image.size if orientation in (5, 6, 7, 8) else image.size[::-1]
    return Header(kind, height, width, orientation, plain=False)


def _may_have_exif(jpeg: bytes) -> bool:
    """Whether Exif is among the segments before the picture, or these do not follow one another."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and (marker := jpeg[at + 1 : at + 2]) not in (b"", b"\xff"):
        if marker == _SCAN:
            return False
        if marker == _APP1 and jpeg.startswith(b"Exif\0", at + 4):
            return True
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return True


_SCAN, _APP1 = b"\xda", b"\xe1"  # markers of a JPEG's segments (T.81, table B.1)


def open_image(data: bytes, name: str = "image", limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Opens a file with Pillow, which reads its header only. Raises Reject like `read_header`."""
    kind = sniff(data)
    if not kind:
        raise Reject("not_image", f"{name}: not a readable image ({', '.join(FORMATS)})")
    if len(data) > limits.max_bytes:
        raise Reject(
            "too_many_bytes", f"{name}: {len(data)} bytes, more than {limits.max_bytes}; shrink it first"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    except Exception as error:  # whatever a hostile header makes of Pillow's parsers
        raise _broken(data, kind, name, error) from error
    _check_size(image.height, image.width, name, limits)
    return image


def _check_size(height: int, width: int, name: str, limits: Limits) -> None:
    size = f"{width}x{height} pixels"
    if height * width > limits.max_pixels:
        raise Reject("bomb", f"{name}: {size}, more than {limits.max_pixels}; shrink it first")
    if min(height, width) < max(limits.min_side, 1):
        raise Reject("too_small", f"{name}: {size}, less than {limits.min_side} on a side")
    if max(height, width) > limits.max_aspect * min(height, width):
        raise Reject("aspect", f"{name}: {size}, more than {limits.max_aspect:g} times as long as wide")


def decode(data: bytes, name: str = "image", limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decodes an image file, the first frame of an animated one, upright.

    Returns RGB, or RGBA where it has transparency. Raises Reject naming the image.
    """
    header = read_header(data, name, limits)
    if header.plain:
        # The same pixels as Pillow's (both are libjpeg-turbo's), in two thirds of the time. It is stricter
        # than Pillow, which decides what can still be shown.
        with contextlib.suppress(ValueError):
            return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    image = open_image(data, name, limits)
    try:
        image = _to_rgb(image)
    except Exception as error:
        raise _broken(data, header.kind, name, error) from error
    return image.transpose(_UPRIGHT[header.orientation]) if header.orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, or RGBA where it has transparency."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        # 16 bits of grey: convert() would clip instead of scaling. Files of 32 bits or of floats have no
        # range of their own; those seen in the wild hold 16-bit or 0..1 values.
        grey = np.asarray(image).astype(np.float64)
        if not np.isfinite(grey).all():
            raise ValueError("pixels that are not finite")
        grey = grey * 255 if image.mode == "F" and grey.max() <= 1 else np.floor(grey / 256)
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that the header tells, 1 if none. Pillow itself turns TIFF files."""
    if image.format == "TIFF" or not ("exif" in image.info or "Raw profile type exif" in image.info):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing
        return 1


def _broken(data: bytes, kind: str, name: str, error: Exception) -> Reject:
    """What is wrong with a file that begins like an image and cannot be read."""
    unidentified = isinstance(error, UnidentifiedImageError)
    words = f"no header of a {kind} file" if unidentified else str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return Reject("bomb", f"{name}: {words}")
    if _is_cut(data, kind) or "truncated" in words.lower():
        return Reject("truncated", f"{name}: the image is damaged or cut off: {words}")
    return Reject("damaged", f"{name}: the image is damaged or cut off: {words}")


def _is_cut(data: bytes, kind: str) -> bool:
    """Whether the end of the file is missing, where its format tells."""
    match kind:
        case "JPEG":
            return b"\xff\xd9" not in data[-64:]
        case "PNG":
            return b"IEND" not in data[-64:]
        case "GIF":
            return b";" not in data[-64:]
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "BMP":
            return int.from_bytes(data[2:6], "little") > len(data)
    return False


def flatten(image: Image.Image, colour: tuple[int, int, int] = WHITE, border: int = 0) -> Image.Image:
    """Pastes an RGB or RGBA image on a background, with `border` pixels of it on each side. Returns RGB."""
    if image.mode == "RGB" and not border:
        return image
    canvas = Image.new("RGB", (image.width + 2 * border, image.height + 2 * border), colour)
    canvas.paste(image, (border, border), image if image.mode == "RGBA" else None)
    return canvas


def resize(image: Image.Image, height: int, width: int, rule: str = "neo") -> Image.Image:
    """Antialiased, with the filter of the family, to the bit as Pillow does it."""
    return pillow(image, height, width, RESIZES[rule].filter, RESIZES[rule].width_first)


def _resize_into(blocks: np.ndarray, image: Image.Image | np.ndarray, to: Resize) -> None:
    """An RGB image, as rows x cols blocks of height x width pixels: uint8 [rows, cols, height, width * 3]."""
    rows, cols, height, width = blocks.shape
    rule = RESIZES[to.rule]
    if compiled(np.asarray(image), blocks, rule.filter, rule.width_first):
        return
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    pixels = np.asarray(resize(image, rows * height, cols * width // 3, to.rule))
    blocks[...] = pixels.reshape(rows, height, cols, width).swapaxes(1, 2)


def to_patches(pixels: np.ndarray, side: int) -> np.ndarray:
    """Cuts uint8 [h * side, w * side, 3] into [h * w, side * side * 3]; a row is (py, px, rgb)."""
    height, width, channels = pixels.shape
    h, w = height // side, width // side
    grid = pixels.reshape(h, side, w, side, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(h * w, side * side * channels)


def make_picture(
    data: bytes,
    to: Resize,
    *,
    name: str = "image",
    limits: Limits = DEFAULT_LIMITS,
    augment_seed: int | None = None,
) -> Picture:
    """Plans how an image file becomes tokens; pixels are decoded when loaded.

    Args:
        data: the file's bytes.
        to: the family's resize rule and the budget of pixels.
        name: shown in errors.
        limits: what is decoded at all.
        augment_seed: background colour and framing are drawn from it; None = white background, no change.

    Raises:
        Reject: if the header shows that it cannot be used; `load_patches`, if only decoding does.
    """
    header = read_header(data, name, limits)
    try:
        plan = to.plan(header.height, header.width)
    except Reject as error:
        raise Reject(error.reason, f"{name}: {error}") from error

    def load_patches(out: np.ndarray | None = None) -> np.ndarray:
        if header.plain and augment_seed is None:
            with contextlib.suppress(ValueError):  # see `decode`
                return cut(simplejpeg.decode_jpeg(data, "RGB"), plan, to, out)
        image = decode(data, name, limits)
        if augment_seed is None:
            return cut(flatten(image), plan, to, out)
        return cut(_augment(image, plan.height, plan.width, augment_seed), plan, to, out)

    return Picture(plan.rows, plan.cols, load_patches, plan.num_grids, plan.height / header.height)


def cut(image: Image.Image | np.ndarray, plan: Plan, to: Resize, out: np.ndarray | None = None) -> np.ndarray:
    """An RGB image, or its uint8 [h, w, 3], resized and cut.

    Returns uint8 [num_grids * rows * cols, patch_dim]: `out`, if there is one, which lies in one piece.
    """
    side = to.side
    down, across = plan.tiles
    tile_height, tile_width = plan.rows * side, plan.cols * side
    lacking = (down * tile_height - plan.height, across * tile_width - plan.width)

    def one_grid(out: np.ndarray | None) -> np.ndarray:
        patches = np.empty((plan.rows * plan.cols, side**2 * 3), np.uint8) if out is None else out
        _resize_into(patches.reshape(plan.rows, plan.cols, side, side * 3), image, to)
        return patches

    if plan.num_grids == 1 and not any(lacking):
        return one_grid(out)
    pixels: np.ndarray = np.empty((plan.height, plan.width, 3), np.uint8)
    _resize_into(pixels.reshape(1, 1, plan.height, plan.width * 3), image, to)
    if any(lacking):
        padding = ((0, lacking[0]), (0, lacking[1]), (0, 0))
        pixels = np.pad(pixels, padding, constant_values=RESIZES[to.rule].padding)
    tiles = pixels.reshape(down, tile_height, across, tile_width, 3).swapaxes(1, 2)
    grids = [to_patches(tile, side) for tile in tiles.reshape(-1, tile_height, tile_width, 3)]
    if plan.thumbnail:
        grids.append(one_grid(None))
    return np.concatenate(grids, out=out)


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
