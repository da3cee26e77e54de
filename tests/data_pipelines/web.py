"""A small img2dataset folder with its share of broken records, and a config that trains on it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import base
from data_pipelines import text

WORDS = [
    "a",
    "cat",
    "sits",
    "on",
    "the",
    "red",
    "mat",
    "near",
    "an",
    "old",
    "house",
    "with",
    "green",
    "windows",
    "and",
    "many",
    "small",
    "birds",
]


def picture(rng: np.random.Generator, size: tuple[int, int] | None = None) -> bytes:
    """A JPEG of (width, height) or a random size, smooth enough to be small."""
    width, height = size or rng.integers(16, 80, 2).tolist()
    grid = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(2, 20)))


def write_tars(folder: Path, shards: int, records: int, seed: int = 0, broken: bool = True) -> list[str]:
    """Writes img2dataset shards; returns the ids "shard#record" of the records that are no documents.

    Of every 10 records one has no image, one an image cut off before its header's end, one cut off in its
    pixels, and one no text.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    bad = []
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(records):
                fields = {"jpg": picture(rng), "txt": caption(rng).encode()}
                fault = i % 10 if broken and i % 10 < 4 else None
                if fault == 0:
                    del fields["jpg"]
                elif fault == 1:
                    fields["jpg"] = fields["jpg"][:30]
                elif fault == 2:
                    fields["jpg"] = fields["jpg"][: len(fields["jpg"]) * 2 // 3]
                elif fault == 3:
                    fields["txt"] = b"  "
                fields["json"] = json.dumps({"key": i, "status": "success"}).encode()
                if fault is not None:
                    bad.append(f"{shard:05}.tar#{i}")
                for name, data in fields.items():
                    info = tarfile.TarInfo(f"{shard:05}{i:04}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return bad


def write_tokenizer(path: Path) -> None:
    path.write_text(text.train_tokenizer([*WORDS, " ".join(WORDS)], 300))


def config(folder: Path, **sources: ConfigDict) -> ConfigDict:
    """A config that trains on these sources with images of up to 16 tokens in rows of 256 tokens."""
    c = base.get_config()
    write_tokenizer(folder / "tokenizer.json")
    c.data.tokenizer = str(folder / "tokenizer.json")
    c.data.index_path = str(folder / "index")
    for name, source in sources.items():
        c.data.sources[name] = source
    c.data.window = 32
    c.data.prefetch = 0
    c.model.embed.patch_size = 8
    c.stages = ("only",)
    c.stage.only = base.stage(
        100, batch_size=4, row_tokens=256, row_patches=64, min_pixels=16 * 16, max_pixels=64 * 64
    )
    return c
