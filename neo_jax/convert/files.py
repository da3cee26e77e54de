"""Safetensors folders: read through memory maps, written tensor by tensor.

A folder holds one `*.safetensors`, or shards and `model.safetensors.index.json` saying which tensor is where.
A safetensors file is the header's length (uint64), a JSON header {name: dtype, shape, [start, end)} and the
tensors' bytes. Nothing here loads a pickle.
"""

import json
import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from neo_jax.convert.table import Row, to_theirs
from neo_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = ("model.safetensors", "weights.safetensors")  # names of files that hold everything
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
MAX_SHARD = 5_000_000_000  # bytes; what `transformers` writes
DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = {"float32": "F32", "bfloat16": "BF16"}  # dtypes we write


class Tensor(NamedTuple):
    """One tensor in a file."""

    file: pathlib.Path
    dtype: str  # key of DTYPES
    shape: tuple[int, ...]
    start: int  # byte in the file

    def read(self) -> np.ndarray:
        """Its values, read-only and mapped: pages come from the file as they are touched."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape)


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name; only headers are read.

    Raises:
        UserError: there are none, a file is damaged or cut off, or the index and its files disagree.
    """
    index = folder / INDEX
    if index.is_file():
        return _open_index(index)
    for name in SINGLE:
        if (folder / name).is_file():
            return read_header(folder / name)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files, but no {INDEX} to say what is where")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: a pickle, which can run any code when loaded, is never read; save the "
            "checkpoint as safetensors where you trust it"
        )
    raise UserError(f"{folder}: no safetensors files")


def _open_index(index: pathlib.Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: weight_map should map tensor names to file names")
    shards = {}
    for name in sorted(set(weight_map.values())):
        # A name out of the index must not lead out of the folder.
        if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        shards[name] = read_header(index.parent / name)
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise UserError(f"{index.parent / shard}: has no tensor {tensor}, which {INDEX} says is in it")
    for shard, tensors in shards.items():
        for tensor in tensors:
            if weight_map.get(tensor) != shard:
                raise UserError(f"{index.parent / shard}: tensor {tensor} is not the one that {INDEX} names")
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold an object")
    return value


def read_header(file: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        UserError: it is missing, cut off or not such a file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
            if length > MAX_HEADER:
                raise UserError(f"{file}: not a safetensors file, or cut off in its first bytes")
            header = stream.read(length)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    if len(header) < length:
        raise UserError(f"{file}: cut off: its header has {length} bytes, of which {len(header)} are there")
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a safetensors file: its header is damaged ({error})") from error
    return tensors


def _entry(file: pathlib.Path, name: str, entry: Mapping[str, Any], base: int, size: int) -> Tensor:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPES:
        raise UserError(f"{file}: tensor {name} is of type {dtype}; supported are {', '.join(DTYPES)}")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != wanted or start < 0:
        raise UserError(
            f"{file}: tensor {name} of shape {shape} should have {wanted} bytes, not {end - start}"
        )
    if base + end > size:
        raise UserError(
            f"{file}: cut off: tensor {name} of shape {shape} ends at byte {base + end}, the file at {size}"
        )
    return Tensor(file, dtype, shape, base + start)


def write_folder(
    folder: pathlib.Path,
    rows: Sequence[Row],
    load: Callable[[str], np.ndarray],
    dtype: str = "float32",
    max_shard: int = MAX_SHARD,
) -> None:
    """Writes all tensors of a table into an existing folder; equal values give equal bytes.

    Shards follow the order of the rows, and are as large as `max_shard` allows. Our parameters are loaded one
    after the other, each once; only those that share a fused tensor are in memory together.

    Args:
        load: path -> our parameter.
        dtype: key of FLOATS.
    """
    places = _lay_out(folder, rows, FLOATS[dtype], max_shard)
    for group in _together(rows):
        params = {path: load(path) for path in sorted({path for row in group for path in row.paths})}
        for row in group:
            tensor = places[row.name]
            out = np.memmap(tensor.file, DTYPES[tensor.dtype], "r+", tensor.start, tensor.shape)
            out[...] = to_theirs(row, params)
            out.flush()
        del params  # before the next are loaded


def _lay_out(folder: pathlib.Path, rows: Sequence[Row], dtype: str, max_shard: int) -> dict[str, Tensor]:
    """Makes the files with their headers, and room for their tensors."""
    shards: list[list[Row]] = [[]]
    filled = 0
    for row in rows:
        size = math.prod(row.shape) * DTYPES[dtype].itemsize
        if shards[-1] and filled + size > max_shard:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += size
    places: dict[str, Tensor] = {}
    weight_map = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for row in shard:
            start, end = end, end + math.prod(row.shape) * DTYPES[dtype].itemsize
            entries[row.name] = {"dtype": dtype, "shape": list(row.shape), "data_offsets": [start, end]}
            weight_map[row.name] = name
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with (folder / name).open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + end)
        for row in shard:
            start = 8 + len(header) + entries[row.name]["data_offsets"][0]
            places[row.name] = Tensor(folder / name, dtype, row.shape, start)
        total += end
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return places


def _together(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows in groups that share no parameter, in order of first appearance."""
    groups: dict[str, list[Row]] = {}  # parameter -> its group
    for row in rows:
        merged: list[Row] = []
        for group in {id(groups[path]): groups[path] for path in row.paths if path in groups}.values():
            merged += group
        merged.append(row)
        for member in merged:
            for path in member.paths:
                groups[path] = merged
    return list({id(group): group for group in groups.values()}.values())
