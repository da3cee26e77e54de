"""Damages N images in every way and counts what became of them.

    python -m tests.data_pipelines.mutated_images N

A program of its own, so that a crash or a hang of a decoder ends it and not the test run. Prints one JSON
object: outcome -> how many; outcomes are "ok" and the reasons of Reject.
"""

import collections
import io
import json
import sys
import warnings

import numpy as np
from PIL import Image

from data_pipelines import images
from data_pipelines.errors import Reject
from data_pipelines.resize import Resize


def originals() -> list[bytes]:
    """Small images of every format and the variants that have decoders of their own."""
    rng = np.random.default_rng(7)
    noise = Image.fromarray(rng.integers(0, 256, (40, 56, 4), np.uint8), "RGBA")
    smooth = noise.resize((9, 7)).resize((72, 48))
    rgb, grey = smooth.convert("RGB"), smooth.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    variants = [
        ("JPEG", rgb, {"quality": 90, "exif": exif}),
        ("JPEG", rgb, {"progressive": True, "subsampling": 0}),
        ("JPEG", grey, {}),
        ("JPEG", smooth.convert("CMYK"), {}),
        ("PNG", smooth, {}),
        ("PNG", rgb.quantize(16), {}),
        ("PNG", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}),
        ("PNG", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("GIF", rgb.quantize(64), {"save_all": True, "append_images": [rgb.rotate(180).quantize(64)]}),
        ("WEBP", smooth, {"lossless": True}),
        ("WEBP", rgb, {"exif": exif}),
        ("WEBP", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("AVIF", smooth, {"speed": 10}),
        ("AVIF", rgb, {"speed": 10, "exif": exif}),
        ("BMP", rgb, {}),
        ("BMP", rgb.quantize(16), {}),
        ("TIFF", rgb, {}),
        ("TIFF", smooth, {"compression": "tiff_lzw"}),
        ("TIFF", rgb, {"compression": "jpeg", "exif": exif}),
        ("TIFF", grey, {"compression": "tiff_deflate"}),
    ]
    files = []
    for format_, image, options in variants:
        file = io.BytesIO()
        image.save(file, format_, **options)
        files.append(file.getvalue())
    return files


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One random damage: flipped bits, cut, edited header, lost, doubled or foreign stretch."""
    changed = bytearray(data)
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    match int(rng.integers(7)):
        case 0:  # bits anywhere
            for place in rng.integers(0, len(data), rng.integers(1, 17)):
                changed[place] ^= 1 << int(rng.integers(8))
        case 1:  # bits of the header
            for place in rng.integers(0, min(64, len(data)), rng.integers(1, 9)):
                changed[place] ^= 1 << int(rng.integers(8))
        case 2:
            del changed[start:]
        case 3:  # numbers of the header
            place = int(rng.integers(4, min(200, len(data) - 4)))
            extreme = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\1\0\0"])
            changed[place : place + 4] = extreme
        case 4:
            del changed[start : start + length]
        case 5:
            changed[start:start] = changed[start : start + length]
        case 6:
            changed[start : start + length] = other[start : start + length]
    return bytes(changed)


def main(count: int) -> None:
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(20251124)
    files = originals()
    to = Resize("neo", 32, 32**2, 128**2)
    limits = images.Limits(max_pixels=2_000_000)
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(count):
        data = mutate(files[number % len(files)], files[int(rng.integers(len(files)))], rng)
        try:
            picture = images.make_picture(data, to, name=f"file{number}", limits=limits)
            patches = picture.load_patches()
            assert patches.shape == (picture.rows * picture.cols, 32 * 32 * 3) and patches.dtype == np.uint8
            outcomes["ok"] += 1
        except Reject as reject:
            assert str(reject).startswith(f"file{number}: ") and "\n" not in str(reject), reject
            outcomes[reject.reason] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]))
