"""ArrayRecord shards on disk: written whole, described by size and hash, checked before use."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError

RECORDS_PER_SHARD = 2048


def write(folder: Path, split: str, source: str, drawings: Sequence[Drawing]) -> list[dict[str, Any]]:
    """Writes `<split>/<source>-i-of-n.array_record` files and returns their manifest entries.

    Raises DataError if the disk is full.
    """
    (folder / split).mkdir(exist_ok=True)
    num_shards = -(-len(drawings) // RECORDS_PER_SHARD)
    entries = []
    for shard in range(num_shards):
        part = drawings[shard * RECORDS_PER_SHARD : (shard + 1) * RECORDS_PER_SHARD]
        file = f"{split}/{source}-{shard:05}-of-{num_shards:05}.array_record"
        entry = {"file": file, "split": split, "source": source}
        entries.append(entry | write_records(folder / file, (drawing.to_bytes() for drawing in part)))
    return entries


def write_records(path: Path, records: Iterable[bytes]) -> dict[str, Any]:
    """Writes an ArrayRecord file; returns its {"records", "bytes", "sha256"}. Equal records give equal bytes.

    Raises DataError if the disk is full.
    """
    number = 0
    # One record per chunk: any record can be read alone. What is in them is compressed already.
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        for record in records:
            writer.write(record)
            number += 1
        writer.close()
    except RuntimeError as error:  # how ArrayRecord reports a full disk
        raise DataError(f"cannot write {path}: {error}") from error
    return {"records": number} | describe(path)


def describe(path: Path) -> dict[str, Any]:
    """Returns {"bytes", "sha256"} of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check(folder: Path, entries: Sequence[dict[str, Any]], *, contents: bool = False) -> None:
    """Compares files with their manifest entries: sizes, which takes no reading.

    A record that is damaged all the same is found when it is read, by the checksum that ArrayRecord keeps.

    Args:
        folder: that the entries' files are in.
        entries: of a manifest.
        contents: compare the hashes, too.

    Raises:
        DataError: names the first bad one.
    """
    for entry in entries:
        path = folder / entry["file"]
        remedy = f"delete the folder {folder} and build it again"
        try:
            found = path.stat().st_size
            sha256 = describe(path)["sha256"] if contents else entry["sha256"]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
        if found != entry["bytes"]:
            raise DataError(f"{path}: has {found} bytes instead of {entry['bytes']}; {remedy}")
        if sha256 != entry["sha256"]:
            raise DataError(f"{path}: damaged, its sha256 is not the manifest's; {remedy}")
