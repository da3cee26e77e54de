"""Benchmark data: real photographs as JPEG files of many sizes with English captions, in WebDataset tars.

The photographs are those in scikit-image's wheel; each record is a crop of one, rescaled to a longer side of
256 to 1024 pixels and saved at a quality of 80 to 95. Captions are consecutive words of Python's manual, of
the lengths that alt texts have (log-normal, 12 words in the middle), every tenth of those of a paragraph.
"""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from pydoc_data import topics

import numpy as np
from PIL import Image

from data_pipelines import text
from data_pipelines.build.packages import cache_dir
from data_pipelines.errors import DataError

NAMES = (
    *("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg"),
    *("motorcycle_left.png", "motorcycle_right.png", "rocket.jpg", "camera.png", "grass.png", "gravel.png"),
)
PER_SHARD = 100
VOCAB_SIZE = 8192
VERSION = 2  # raise it when the same number of photos would give other files


def folder(num_photos: int, seed: int = 0) -> Path:
    """A folder of 00000.tar, ... and tokenizer.json, made once and kept in the cache.

    Raises DataError without scikit-image, or if the cache cannot be written.
    """
    path = cache_dir() / "benchmark" / f"photos-{VERSION}-{num_photos}-{seed}"
    if (path / "tokenizer.json").exists():
        return path
    originals = _originals()
    words = _words()
    rng = np.random.default_rng(seed)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for shard in range(-(-num_photos // PER_SHARD)):
            count = min(PER_SHARD, num_photos - shard * PER_SHARD)
            with tarfile.open(path / f"{shard:05}.tar", "w") as tar:
                for i in range(count):
                    _add(tar, f"{shard:05}{i:04}", _photo(originals, rng), _caption(words, rng))
        tokenizer = text.train_tokenizer(_paragraphs(words), VOCAB_SIZE)
        (path / "tokenizer.json.partial").write_text(tokenizer)
        os.replace(path / "tokenizer.json.partial", path / "tokenizer.json")
    except OSError as error:
        raise DataError(f"cannot write the benchmark's photos to {path}: {error}") from error
    return path


def captions(number: int, seed: int = 1) -> list[str]:
    """More captions of the same kind."""
    words = _words()
    rng = np.random.default_rng(seed)
    return [_caption(words, rng) for _ in range(number)]


def _words() -> list[str]:
    return " ".join(topics.topics[name] for name in sorted(topics.topics)).split()


def _originals() -> list[Image.Image]:
    try:
        import skimage
    except ImportError as error:
        raise DataError(
            "the benchmark's photos are scikit-image's: install the extra `benchmark` "
            "(pip install -e '.[benchmark]')"
        ) from error
    data = Path(skimage.__file__).parent / "data"
    return [Image.open(data / name).convert("RGB") for name in NAMES]


def _photo(originals: list[Image.Image], rng: np.random.Generator) -> bytes:
    """A crop of 60 to 100 % of each side, rescaled."""
    image = originals[rng.integers(len(originals))]
    width, height = (int(side * rng.uniform(0.6, 1.0)) for side in image.size)
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    scale = rng.uniform(256, 1024) / max(width, height)
    box = (int(left), int(top), int(left) + width, int(top) + height)
    size = (max(64, round(width * scale)), max(64, round(height * scale)))
    file = io.BytesIO()
    crop = image.resize(size, Image.Resampling.LANCZOS, box=box)
    crop.save(file, "JPEG", quality=int(rng.integers(80, 96)))
    return file.getvalue()


def _caption(words: list[str], rng: np.random.Generator) -> str:
    middle = 150 if rng.random() < 0.1 else 12
    count = int(np.clip(rng.lognormal(np.log(middle), 0.6), 3, 600))
    start = int(rng.integers(len(words) - count))
    return " ".join(words[start : start + count])


def _paragraphs(words: list[str]) -> list[str]:
    return [" ".join(words[start : start + 100]) for start in range(0, len(words), 100)]


def _add(tar: tarfile.TarFile, key: str, photo: bytes, caption: str) -> None:
    record = {"caption": caption, "sha256": hashlib.sha256(photo).hexdigest()}
    for suffix, content in (("jpg", photo), ("txt", caption.encode()), ("json", json.dumps(record).encode())):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
