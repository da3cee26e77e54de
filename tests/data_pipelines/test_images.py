"""Images: NEO's resize to the pixel, patch layout, and files that are no images."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from safetensors.numpy import load_file

from configs import base
from data_pipelines import images
from data_pipelines.errors import DataError


def encode(pixels: np.ndarray, format_: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_, **options)
    return file.getvalue()


def to_neo_rows(patches: np.ndarray, rows: int, cols: int, side: int, patch: int) -> np.ndarray:
    """Our [tokens, side * side * 3] as NEO's normalised rows of one 16-pixel patch, (channel, py, px)."""
    pixels = patches.reshape(rows, cols, side, side, 3).transpose(0, 2, 1, 3, 4)
    pixels = pixels.reshape(rows * side // patch, patch, cols * side // patch, patch, 3)
    embed = base.model().embed
    pixels = (pixels / 255 - np.array(embed.pixel_mean)) / np.array(embed.pixel_std)
    return pixels.transpose(0, 2, 4, 1, 3).reshape(-1, 3 * patch * patch)


def test_smart_resize_equals_neo(golden_dir):
    table = json.loads((golden_dir("neo") / "smart_resize.json").read_text())
    for height, width, min_pixels, max_pixels, expected in table["rows"]:
        if expected is None:
            with pytest.raises(DataError, match="times as long as wide"):
                images.smart_resize(height, width, table["factor"], min_pixels, max_pixels)
        else:
            found = images.smart_resize(height, width, table["factor"], min_pixels, max_pixels)
            assert found == tuple(expected), (height, width, min_pixels, max_pixels)


def test_patches_equal_neo(golden_dir):
    folder = golden_dir("neo")
    table = json.loads((folder / "smart_resize.json").read_text())
    golden = load_file(folder / "preprocess.safetensors")
    side = table["factor"]
    assert table["images"]
    for case in table["images"]:
        name = f"{case['setting']}.image{case['image']}"
        budget = {key: case[key] for key in ("min_pixels", "max_pixels")}
        picture = images.make_picture(encode(golden[f"image{case['image']}"]), side=side, **budget)
        patches = picture.load_patches()
        np.testing.assert_array_equal(
            patches, images.to_patches(golden[f"{name}.resized_uint8"], side), err_msg=name
        )
        grid = golden[f"{name}.grid_hw"][0]
        assert (picture.rows, picture.cols) == tuple(grid // 2)
        neo_rows = to_neo_rows(patches, picture.rows, picture.cols, side, side // 2)
        np.testing.assert_allclose(neo_rows, golden[f"{name}.pixel_values"], atol=1e-5)


@given(
    height=st.integers(1, 5000),
    aspect=st.floats(1 / 190, 190),
    factor=st.sampled_from([14, 28, 32]),
    max_side=st.integers(4, 64),
    share=st.floats(0.01, 1),
)
def test_smart_resize_keeps_its_promises(height, aspect, factor, max_side, share):
    width = max(1, round(height * aspect))
    if max(height, width) > images.MAX_ASPECT_RATIO * min(height, width):
        return
    max_pixels = (max_side * factor) ** 2
    min_pixels = int(max_pixels * share)
    new_height, new_width = images.smart_resize(height, width, factor, min_pixels, max_pixels)
    assert new_height % factor == new_width % factor == 0
    assert min(new_height, new_width) >= factor
    rounded = factor * round(height / factor), factor * round(width / factor)
    if rounded[0] * rounded[1] > max_pixels and min(new_height, new_width) > factor:
        assert new_height * new_width <= max_pixels
    if rounded[0] * rounded[1] < min_pixels:
        assert new_height * new_width >= min_pixels
    if height % factor == width % factor == 0 and min_pixels <= height * width <= max_pixels:
        assert (new_height, new_width) == (height, width)


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
        images.make_picture(encode(pixels), side=32, min_pixels=64**2, max_pixels=64**2, augment_seed=seed)
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
        picture = images.make_picture(
            encode(opaque), side=32, min_pixels=32**2, max_pixels=32**2, augment_seed=seed
        )
        centre = picture.load_patches().reshape(32, 32, 3)[12:20, 12:20]
        np.testing.assert_array_equal(centre, 7)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP"])
def test_decode_formats(format_):
    pixels = np.full((8, 8, 3), 200, np.uint8)
    image = images.decode(encode(pixels, format_))
    assert image.mode == "RGBA"
    assert image.size == (8, 8)
    assert np.abs(np.asarray(image)[..., 0].astype(int) - 200).max() <= 2


def test_decode_scales_16_bit_grey():
    image = images.decode(encode(np.full((4, 4), 32768, np.uint16)))
    assert np.asarray(image)[0, 0].tolist() == [128, 128, 128, 255]


def test_exif_rotation_decides_the_grid():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.fromarray(np.zeros((32, 96, 3), np.uint8)).save(file, "JPEG", exif=exif)
    picture = images.make_picture(file.getvalue(), side=32, min_pixels=32**2, max_pixels=96**2)
    assert (picture.rows, picture.cols) == (3, 1)
    assert picture.load_patches().shape == (3, 32 * 32 * 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable image"),
        (b"GIF89a or so", "not a readable image"),
        (b"<svg/>", "not a readable image"),
    ],
)
def test_not_an_image(data, message):
    with pytest.raises(DataError, match=f"cat.png: {message}"):
        images.decode(data, "cat.png")


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_cut_off_image(format_):
    rng = np.random.default_rng(0)
    data = encode(rng.integers(0, 256, (64, 64, 3), np.uint8), format_)
    with pytest.raises(DataError, match="cat"):
        images.decode(data[: len(data) // 2], "cat")


def test_too_large_image(monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_PIXELS", 100)
    with pytest.raises(DataError, match="cat: 20x10 pixels, more than 100"):
        images.decode(encode(np.zeros((10, 20, 3), np.uint8)), "cat")


def test_too_long_image_is_named():
    with pytest.raises(DataError, match="cat: 300x1 pixels"):
        images.make_picture(
            encode(np.zeros((1, 300, 3), np.uint8)), side=32, min_pixels=1, max_pixels=10**6, name="cat"
        )
