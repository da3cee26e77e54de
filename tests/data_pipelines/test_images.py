"""Images: NEO's resize to the pixel, patch layout, and files that are no images."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines import images
from data_pipelines.errors import REASONS, DataError, Reject
from data_pipelines.resize import Resize


def encode(pixels: np.ndarray, format_: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_, **options)
    return file.getvalue()


TWENTY_BY_TEN = encode(np.zeros((10, 20, 3), np.uint8))


def test_patch_layout():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches = images.to_patches(pixels, 2)
    assert patches.shape == (6, 12)
    np.testing.assert_array_equal(patches[4].reshape(2, 2, 3), pixels[2:4, 2:4])


def test_flatten_blends_transparency_with_the_background():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 128, 255)
    flat = np.asarray(images.flatten(Image.fromarray(rgba), (255, 255, 255)))
    np.testing.assert_array_equal(flat[0, :, 0], [255, 127, 0])


def test_augmentation_is_a_function_of_its_seed_and_keeps_the_grid():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = (255, 0, 0, 255)
    pictures = [
        images.make_picture(encode(pixels), Resize("neo", 32, 64**2, 64**2), augment_seed=seed)
        for seed in (1, 1, 2, 3, 4, 5, 6, 7, 8)
    ]
    patches = [picture.load_patches() for picture in pictures]
    np.testing.assert_array_equal(patches[0], patches[1])
    assert len({p.tobytes() for p in patches}) == len(patches) - 1
    corners = {tuple(p[0, :3]) for p in patches}
    assert (255, 255, 255) in corners and len(corners) > 2, "white and coloured backgrounds"
    for p in patches:
        assert p.shape == (4, 32 * 32 * 3)


def test_zoom_never_shows_more_than_the_background_around_the_picture():
    opaque = np.full((32, 32, 3), 7, np.uint8)
    for seed in range(50):
        picture = images.make_picture(encode(opaque), Resize("neo", 32, 32**2, 32**2), augment_seed=seed)
        centre = picture.load_patches().reshape(32, 32, 3)[12:20, 12:20]
        np.testing.assert_array_equal(centre, 7)


LOSSY = {"JPEG", "WEBP", "AVIF"}


MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16"]
LACKING: dict[str, set[str]] = {  # what Pillow cannot write, or writes other pixels of
    "AVIF": {"I;16", "CMYK"},
    "BMP": {"LA", "CMYK", "I;16"},
    "GIF": {"I;16", "CMYK"},
    "JPEG": {"RGBA", "LA", "P", "I;16"},
    "PNG": {"CMYK"},
    "TIFF": set(),
    "WEBP": {"I;16", "CMYK"},
}


@pytest.mark.parametrize(
    ("format_", "mode"), [(f, mode) for f in images.FORMATS for mode in MODES if mode not in LACKING[f]]
)
def test_every_mode_of_every_format_decodes(format_, mode):
    """A grey ramp comes back, whatever the file's pixels are."""
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    image = Image.fromarray(ramp)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, format_)
    decoded = images.decode(file.getvalue())
    assert decoded.mode == ("RGBA" if decoded.getbands()[-1] == "A" else "RGB")
    pixels = np.asarray(images.flatten(decoded)).astype(int)
    expected = np.asarray(image.convert("L")) if mode == "1" else ramp
    expected = np.repeat(expected[..., None], 3, axis=2)
    tolerance = 8 if format_ not in LOSSY else 40 if mode == "1" else 12
    assert np.abs(pixels - expected).max() <= tolerance


def test_transparency_shows_the_background():
    pixels = np.zeros((8, 8, 4), np.uint8)
    for format_ in ("PNG", "WEBP", "AVIF", "TIFF"):
        image = images.decode(encode(pixels, format_))
        assert image.mode == "RGBA"
        assert (np.asarray(images.flatten(image)) == 255).all()
    palette = Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P")
    for format_ in ("PNG", "GIF"):
        file = io.BytesIO()
        palette.save(file, format_, transparency=0)
        assert (np.asarray(images.flatten(images.decode(file.getvalue()))) == 255).all()


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "AVIF", "PNG", "TIFF"])
def test_the_first_frame_of_many(format_):
    frames = [Image.new("RGB", (16, 16), (level, level, level)) for level in (200, 0, 100)]
    file = io.BytesIO()
    frames[0].save(file, format_, save_all=True, append_images=frames[1:])
    pixels = np.asarray(images.flatten(images.decode(file.getvalue()))).astype(int)
    assert np.abs(pixels - 200).max() <= 4


def test_decode_scales_16_bit_grey():
    image = images.decode(encode(np.full((4, 4), 32768, np.uint16)))
    assert np.asarray(image)[0, 0].tolist() == [128, 128, 128]


def test_fast_jpeg_pixels_are_pillows(monkeypatch):
    """Whatever decodes: where simplejpeg is not installed, Pillow does everything."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((333, 211))
    for options in ({}, {"quality": 30}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}):
        file = io.BytesIO()
        smooth.save(file, "JPEG", **options)
        expected = np.asarray(Image.open(io.BytesIO(file.getvalue())))
        np.testing.assert_array_equal(images.decode(file.getvalue()), expected)
        to = Resize("neo", 32, 64**2, 128**2)
        with monkeypatch.context() as without:
            fast = images.make_picture(file.getvalue(), to).load_patches()
            without.setattr(images, "simplejpeg", None)
            np.testing.assert_array_equal(images.make_picture(file.getvalue(), to).load_patches(), fast)
            np.testing.assert_array_equal(images.decode(file.getvalue()), expected)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format_, orientation):
    """As Pillow's own exif_transpose has it, in the grid and in the pixels."""
    ramp = np.arange(32 * 96, dtype=np.int64).reshape(32, 96) * 255 // (32 * 96)
    pixels = np.stack([ramp, ramp[::-1], np.roll(ramp, 48, 1)], -1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).convert("RGB")
    np.testing.assert_array_equal(images.decode(file.getvalue()), upright)
    picture = images.make_picture(file.getvalue(), Resize("neo", 32, 32**2, 96**2))
    assert (picture.rows, picture.cols) == ((3, 1) if orientation > 4 else (1, 3))
    np.testing.assert_array_equal(picture.load_patches(), images.to_patches(np.asarray(upright), 32))


def reason(data: bytes, limits: images.Limits = images.DEFAULT_LIMITS) -> str:
    with pytest.raises(Reject, match=r"^cat\.png: ") as rejected:
        images.decode(data, "cat.png", limits)
    return rejected.value.reason


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"%PDF-1.7", b"<!DOCTYPE html>", b"\0" * 1000])
def test_not_an_image(data):
    assert reason(data) == "not_image"


@pytest.mark.parametrize("brand", [b"mif1", b"msf1"])
def test_avif_by_the_brands_it_is_compatible_with(brand):
    data = encode(np.full((48, 64, 3), 200, np.uint8), "AVIF")
    box, rest = data[: data[3]], data[data[3] :]
    assert box[4:12] == b"ftypavif" and b"avif" in box[16:]
    general = box[:8] + brand + box[12:]
    np.testing.assert_array_equal(images.decode(general + rest), images.decode(data))
    # HEIC; the brand only behind the box; the brand only as the version
    for other in (general.replace(b"avif", b"heic"), general[:3] + b"\x10" + general[4:16] + b"avif"):
        assert reason(other + rest) == "not_image"
    assert images.sniff(b"\0\0\0\x14ftyp" + brand + b"avif" + b"heic") == ""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # which pytest shows whatever images.py says
@pytest.mark.parametrize("format_", images.FORMATS)
def test_cut_off_and_damaged_images(format_):
    rng = np.random.default_rng(0)
    data = encode(rng.integers(0, 256, (64, 64, 3), np.uint8), format_)
    ambiguous = {"damaged"} if format_ in ("AVIF", "TIFF") else set()  # these do not tell their length
    assert reason(data[: len(data) // 2]) in {"truncated"} | ambiguous
    assert reason(data[:14]) in ("truncated", "damaged")
    images.decode(data + b"something behind it")


def test_limits_are_read_off_the_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    data = TWENTY_BY_TEN
    assert reason(data, images.Limits(max_pixels=100)) == "bomb"
    assert reason(data, images.Limits(max_bytes=10)) == "too_many_bytes"
    assert reason(data, images.Limits(min_side=11)) == "too_small"
    assert reason(data, images.Limits(max_aspect=1.9)) == "aspect"
    assert images.open_image(data, "cat.png", images.Limits(max_aspect=2)).size == (20, 10)


def test_a_declared_size_of_gigapixels_is_a_bomb():
    png = bytearray(TWENTY_BY_TEN)
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    assert reason(bytes(png)) == "bomb"


@pytest.mark.parametrize("declared", ["jpg", ".JPG", "image/jpeg", "a/b.jpeg", "image/x-png", "webp", "gif"])
def test_wrong_mime(declared):
    with pytest.raises(Reject) as rejected:
        images.check_declared(b"<html>404</html>", declared)
    assert rejected.value.reason == "wrong_mime"
    images.check_declared(encode(np.zeros((4, 4, 3), np.uint8), "TIFF"), declared)  # can be shown
    for nothing in ("", "bin", "application/octet-stream"):
        images.check_declared(b"<html>404</html>", nothing)


def test_too_long_image_is_named():
    with pytest.raises(DataError, match="cat: 300x1 pixels"):
        images.make_picture(encode(np.zeros((1, 300, 3), np.uint8)), Resize("neo", 32, 1, 10**6), name="cat")


def test_no_damaged_file_crashes_hangs_or_is_lost():
    """Thousands of mutated files: each is a picture or a Reject with its reason, in a program of its own."""
    count = 4000
    command = [sys.executable, "-m", "tests.data_pipelines.mutated_images", str(count)]
    run = subprocess.run(
        command, capture_output=True, timeout=300, cwd=Path(__file__).parents[2], check=False
    )
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == count
    assert set(outcomes) >= {"ok", "not_image", "truncated", "damaged", "bomb"}
    assert set(outcomes) <= {"ok", *REASONS}
