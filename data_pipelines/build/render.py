"""From a drawing's file to a stored image: one size, RGBA, lossless WebP."""

import hashlib
import io
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import resvg_py
from PIL import Image

from data_pipelines import images
from data_pipelines.errors import DataError


def render(name: str, drawing: bytes, size: int) -> tuple[bytes, str]:
    """Returns (WebP bytes, hash of the visible pixels) of an SVG or image file at size x size pixels."""
    if drawing.lstrip().startswith(b"<"):
        try:
            drawing = resvg_py.svg_to_bytes(
                svg_string=drawing.decode(), width=size, height=size, skip_system_fonts=True
            )
        except ValueError as error:
            raise DataError(f"{name}: cannot render the SVG: {error}") from error
    image = images.decode(drawing, name).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.array(image)
    pixels[pixels[..., 3] == 0] = 0  # colours nobody sees
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, exact=True, quality=0, method=0)
    return file.getvalue(), hashlib.sha1(pixels.tobytes()).hexdigest()


def render_all(drawings: Sequence[tuple[str, bytes]], size: int) -> Iterator[tuple[bytes, str]]:
    """Renders (name, drawing) pairs on all cores; results come in order."""
    names, files = zip(*drawings, strict=True)
    # Rendering holds Python's lock, so processes; spawned, because forking a threaded parent can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(render, names, files, [size] * len(names), chunksize=64)
