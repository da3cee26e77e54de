"""What a data folder holds: its manifest, sample rows as arrays, histograms, how full the rows are.

A folder of packed rows is shown as it is. Of a folder of documents a sample is packed here, by the rules of a
config or by `DEFAULT_RULES`.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from data_pipelines.build import manifest as manifest_lib, shards as shards_lib
from data_pipelines.build.items import Kept
from data_pipelines.build.outputs import Rows
from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError
from data_pipelines.page.rows import Row
from data_pipelines.records import from_bytes
from data_pipelines.resize import Resize
from data_pipelines.rows import RowShape, from_record
from data_pipelines.schema import Example
from data_pipelines.text import Tokenizer

SAMPLE = 256  # documents that are packed and counted in a folder of documents
DEFAULT_RULES = Rows(
    1024, 1024, Resize("neo", side=32, min_pixels=64 * 64, max_pixels=256 * 256), template="plain"
)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A data folder as the page needs it."""

    folder: Path
    manifest: dict[str, Any]
    rows: list[Row]
    shape: RowShape
    tokenizer: Tokenizer
    statistics: dict[str, Any]  # see build/statistics.py
    packing: dict[str, Any]  # "basis", "rows", "tokens_used", "patches_used"

    def to_json(self) -> dict[str, Any]:
        """The numbers, without pictures."""
        manifest = self.manifest
        return {
            "folder": str(self.folder),
            "form": manifest.get("form", "drawings"),
            "sources": manifest["sources"],
            "counts": manifest["counts"],
            "rejects": rejects(manifest),
            "input": manifest.get("input", []),
            "statistics": self.statistics,
            "packing": self.packing,
            "row_tokens": self.shape.row_tokens,
            "row_patches": self.shape.row_patches,
        }


def read(folder: Path, num_rows: int = 2, rules: Rows | None = None) -> Inspection:
    """Reads a folder that `data_pipelines.build` made.

    Args:
        folder: with manifest.json, tokenizer.json and shards.
        num_rows: how many rows to show, evenly spaced over all.
        rules: how documents are packed, for a folder of documents; None = DEFAULT_RULES.

    Raises:
        DataError: there is no such folder, a file is damaged, or no document can be packed.
    """
    manifest = manifest_lib.read_manifest(folder)
    shards_lib.check(folder, [*manifest["shards"], manifest["tokenizer"]], contents=True)
    tokenizer_file = folder / manifest["tokenizer"]["file"]
    tokenizer = Tokenizer(tokenizer_file)
    if manifest.get("form") == "rows":
        shape = RowShape.from_json(manifest["rows"])
        found = [from_record(record, shape) for record in _spaced(folder, manifest, num_rows)]
        statistics = manifest["statistics"]
        totals = statistics["totals"]
        packing = _packing("all rows", totals["rows"], totals["tokens"], totals["patches"], shape)
        return Inspection(folder, manifest, found, shape, tokenizer, statistics, packing)
    output = rules or DEFAULT_RULES
    writing = output.start(tokenizer_file.read_text(encoding="utf-8"), manifest["sources"])
    records = list(writing.records(_sample(folder, manifest)))
    if not records:
        reasons = "; ".join(sorted({reject.message for reject in writing.rejects})[:3])
        raise DataError(f"{folder}: none of its documents can be packed: {reasons}")
    chosen = [records[i] for i in _evenly(len(records), num_rows)]
    found = [from_record(record, output.shape) for record in chosen]
    statistics = writing.statistics.to_json()
    totals = statistics["totals"]
    basis = (
        f"a sample of {totals['documents']} documents, packed by {'the config' if rules else 'default'} rules"
    )
    packing = _packing(basis, totals["rows"], totals["tokens"], totals["patches"], output.shape)
    return Inspection(folder, manifest, found, output.shape, tokenizer, statistics, packing)


def rejects(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    """source -> reason -> records left out."""
    if "rejects" in manifest:
        return manifest["rejects"]
    return {"all": manifest["dropped"]} if any(manifest.get("dropped", {}).values()) else {}


def intervals(row: Row, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """int [L] each: first key, and the one after the last, of every query; as in neo_jax/model/mask.py."""
    segments, images = row["segment_ids"], row["image_ids"]
    index = np.arange(len(segments))
    begins: np.ndarray = np.append(True, segments[1:] != segments[:-1])
    starts = np.maximum.accumulate(np.where(begins, index, 0))
    ends: np.ndarray = index + 1
    if kind == "image_bidirectional":
        last: np.ndarray = np.append(images[1:] != images[:-1], True)
        run_ends = np.minimum.accumulate(np.where(last, ends, len(index))[::-1])[::-1]
        ends = np.where(images > 0, run_ends, ends)
    return starts, ends


MASKS = ("image_bidirectional", "causal")


def _packing(basis: str, num_rows: int, tokens: int, patches: int, shape: RowShape) -> dict[str, Any]:
    return {
        "basis": basis,
        "rows": num_rows,
        "tokens_used": tokens / (num_rows * shape.row_tokens),
        "patches_used": patches / (num_rows * shape.row_patches),
    }


def _sample(folder: Path, manifest: dict[str, Any]) -> Iterator[Kept]:
    for i, record in enumerate(_spaced(folder, manifest, SAMPLE)):
        yield Kept((0, i), _example(record, manifest))


def _example(record: bytes, manifest: dict[str, Any]) -> Example:
    """A record of a folder of documents, or of the quickstart's drawings in their first language."""
    if manifest.get("form") == "examples":
        return from_bytes(record)
    drawing = Drawing.from_bytes(record)
    return drawing.example(min(drawing.captions))


def _spaced(folder: Path, manifest: dict[str, Any], number: int) -> Iterator[bytes]:
    """About `number` records, evenly spaced over the training shards."""
    entries = [entry for entry in manifest["shards"] if entry["split"] == "train"] or manifest["shards"]
    bounds: np.ndarray = np.append(0, np.cumsum([entry["records"] for entry in entries]))
    wanted = _evenly(int(bounds[-1]), number)
    for shard, entry in enumerate(entries):
        positions = [int(i - bounds[shard]) for i in wanted if bounds[shard] <= i < bounds[shard + 1]]
        if positions:
            reader = array_record_module.ArrayRecordReader(str(folder / entry["file"]))
            yield from reader.read(positions)
            reader.close()


def _evenly(length: int, number: int) -> list[int]:
    return [i * length // number for i in range(number)] if length > number else list(range(length))
