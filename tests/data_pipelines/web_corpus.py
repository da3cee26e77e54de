"""A small corpus as img2dataset writes it, with one record for every reason to leave one out."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

NOUNS = ("harbour", "bike", "violin", "lighthouse", "orchard", "kettle", "glacier", "market", "tram", "cup")
PLACES = ("at the edge of the old town", "under a heavy sky", "beside a quiet river", "in the morning fog")


def picture(seed: int, width: int = 96, height: int = 80) -> np.ndarray:
    """uint8 [height, width, 3]: smooth random shapes, which a perceptual hash can tell apart."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def caption(i: int) -> str:
    return f"A photograph of the {NOUNS[i % 10]} number {i} {PLACES[i % 4]}, by visitor {i * 7919 % 1000}"


def records() -> list[tuple[str, dict[str, bytes]]]:
    """(name of the fault or "", members) in the order of the input."""
    good = [("", {"jpg": jpeg(picture(i)), "txt": caption(i).encode()}) for i in range(60)]
    long_text = (
        "The committee met on the first floor of the town hall to discuss the new bridge over the river and "
        "the money that the county had promised for it in the spring before the elections were announced"
    )
    bad = [
        ("duplicate_image", {"jpg": good[3][1]["jpg"], "txt": b"Another caption for a picture seen before"}),
        ("similar_image", {"jpg": jpeg(picture(5), 60), "txt": b"The same picture again in a smaller file"}),
        ("duplicate_text", {"jpg": jpeg(picture(200)), "txt": caption(7).upper().encode()}),
        ("", {"jpg": jpeg(picture(201)), "txt": long_text.encode()}),
        ("similar_text", {"jpg": jpeg(picture(202)), "txt": f"{long_text} today".encode()}),
        ("text_length", {"jpg": jpeg(picture(203)), "txt": b"Hat"}),
        ("empty_text", {"jpg": jpeg(picture(204)), "txt": b"  "}),
        ("language", {"jpg": jpeg(picture(205)), "txt": b"Ein altes Fahrrad lehnt an der Wand des Hauses"}),
        ("repetition", {"jpg": jpeg(picture(206)), "txt": b"buy cheap shoes " * 12}),
        ("aspect", {"jpg": jpeg(picture(207, 400, 66)), "txt": caption(207).encode()}),
        ("too_small", {"jpg": jpeg(picture(208, 96, 40)), "txt": caption(208).encode()}),
        ("wrong_mime", {"jpg": b"<html>404</html>" * 100, "txt": caption(209).encode()}),
        ("truncated", {"jpg": jpeg(picture(210, 200, 200))[:-1500], "txt": caption(210).encode()}),
        ("missing_image", {"txt": caption(211).encode()}),
        ("bad_json", {"jpg": jpeg(picture(212)), "txt": caption(212).encode(), "json": b"{"}),
        ("bad_text", {"jpg": jpeg(picture(213)), "txt": b"\xff\xfe caf\xe9 au lait in Paris"}),
    ]
    mixed = list(good)
    for i, one in enumerate(bad):
        mixed.insert(20 + 4 * i if i < 5 else 3 * i, one)
    return mixed


def write(
    folder: Path, per_shard: int = 20, extra: Sequence[tuple[str, dict[str, bytes]]] = ()
) -> dict[str, str]:
    """Writes 00000.tar, 00001.tar, ... and returns id -> the fault of the record, "" for a good one."""
    folder.mkdir(parents=True, exist_ok=True)
    faults = {}
    everything = [*records(), *extra]
    for shard in range(-(-len(everything) // per_shard)):
        name = f"{shard:05}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for i, (fault, members) in enumerate(everything[shard * per_shard : (shard + 1) * per_shard]):
                faults[f"{name}#{i}"] = fault
                for suffix, content in {"json": json.dumps({"key": i}).encode(), **members}.items():
                    info = tarfile.TarInfo(f"{shard:05}{i:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return faults
