"""One table per family ties its Hugging Face checkpoint to our parameters, in both directions.

HF linears are (out, in) and convolutions (out, in, kh, kw); ours are (in..., out...), and rows of a
convolution kernel follow the pixel order of `patches` (y, x, rgb). A row of a table is one HF tensor. It
holds one of our parameters, a slice of a stacked one, or, where the family fuses matrices, slices of several.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from neo_jax.errors import UserError
from neo_jax.params import ParamSpec

Shape = tuple[int, ...]


class Row(NamedTuple):
    """One HF tensor: where it lives on either side and how the two layouts correspond."""

    name: str  # HF tensor
    shape: Shape  # HF shape
    kind: str  # key of TRANSFORMS
    paths: tuple[str, ...]  # our parameters in it: one, or several in a fused tensor
    at: int | None = None  # its place along the first axis of each of them (layer, slot); None: all of it


class Transform(NamedTuple):
    """How the numbers move. Values and shapes of our side come in the order of Row.paths."""

    to_ours: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    to_hf: Callable[[Sequence[np.ndarray], Shape], np.ndarray]


def _linear(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.T.reshape(shape)


def _linear_to_hf(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.reshape(shape[::-1]).T


def _conv(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(shape)


def _conv_to_hf(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.reshape(*shape[2:], shape[1], shape[0]).transpose(3, 2, 0, 1)


def _chw(out: int, pixels: int) -> Shape:
    """The convolution kernel that a linear map of (3, side, side) patches is."""
    side = math.isqrt(pixels // 3)
    return out, 3, side, side


def _below(x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Matrices (or biases) below each other: as many rows each as our shape has outputs."""
    rows = [math.prod(shape) // math.prod(x.shape[1:]) for shape in shapes]
    parts = np.split(x, np.cumsum(rows)[:-1])
    return [_linear(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _below_to_hf(parts: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    rows = [part.size // math.prod(shape[1:]) for part in parts]
    return np.concatenate([_linear_to_hf(part, (n, *shape[1:])) for part, n in zip(parts, rows, strict=True)])


def _grouped(x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Fused rows [K][G + 2][d]: for each key/value head its G query heads, then its key, then its value."""
    (*_, N, d), (*_, K, _), _ = shapes
    x = x.reshape(K, N // K + 2, d, *x.shape[1:])
    parts = x[:, :-2], x[:, -2], x[:, -1]
    return [_linear(part.reshape(-1, *x.shape[3:]), shape) for part, shape in zip(parts, shapes, strict=True)]


def _grouped_to_hf(parts: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    (*_, d), inputs = parts[0].shape, shape[1:]
    K = parts[1].shape[-2]
    rows = [_linear_to_hf(part, (part.size // math.prod(inputs), *inputs)) for part in parts]
    return np.concatenate([part.reshape(K, -1, d, *inputs) for part in rows], axis=1).reshape(shape)


def _after_class_to_hf(parts: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    x: np.ndarray = np.zeros(shape, parts[0].dtype)
    x[0, 1:] = parts[0]
    return x


TRANSFORMS: dict[str, Transform] = {
    # The same numbers in the same order.
    "copy": Transform(lambda x, shapes: [x.reshape(shapes[0])], lambda parts, shape: parts[0].reshape(shape)),
    # A matrix (out, in).
    "linear": Transform(
        lambda x, shapes: [_linear(x, shapes[0])], lambda parts, shape: _linear_to_hf(parts[0], shape)
    ),
    # A convolution kernel (out, in, kh, kw).
    "conv": Transform(
        lambda x, shapes: [_conv(x, shapes[0])], lambda parts, shape: _conv_to_hf(parts[0], shape)
    ),
    # A matrix (out, 3 * side * side) over patches flattened as (rgb, y, x).
    "linear_chw": Transform(
        lambda x, shapes: [_conv(x.reshape(_chw(*x.shape)), shapes[0])],
        lambda parts, shape: _conv_to_hf(parts[0], _chw(*shape)).reshape(shape),
    ),
    # Matrices or biases of the same inputs below each other.
    "below": Transform(_below, _below_to_hf),
    # Positions (1, 1 + n, C), the first of a class vector that nothing reads; it is written as 0 (InternVL).
    "after_class": Transform(lambda x, shapes: [x[0, 1:].reshape(shapes[0])], _after_class_to_hf),
    # Queries, keys and values, or their biases, grouped by key/value head (InternLM2; Persimmon, G = 1).
    "grouped_qkv": Transform(_grouped, _grouped_to_hf),
}


class Family(NamedTuple):
    """What a family of checkpoints is: functions of its config.json and of our model config."""

    matches: Callable[[Mapping[str, Any]], bool]  # is this config.json of the family?
    model_changes: Callable[[Mapping[str, Any]], dict[str, Any]]  # -> fields of configs/base.py model()
    table: Callable[[ConfigDict], Iterator[Row]]
    # (model config, special token name -> id, min_pixels, max_pixels) -> config.json
    hf_config: Callable[[ConfigDict, Mapping[str, int], int, int], dict[str, Any]]
    # HF tensor name in a file -> name in the table (older names, prefixes); None: not part of the model
    canonical: Callable[[str], str | None] = lambda name: name
    data: Mapping[str, str] = {}
    # config.json -> least and most pixels of an image
    pixels: Callable[[Mapping[str, Any]], tuple[int, int]] = lambda hf: (256 * 256, 1024 * 1024)
    # whole config -> tensors of its objectives' heads, which only checkpoints of training hold
    heads: Callable[[ConfigDict], Iterator[Row]] = lambda config: iter(())
    # model config -> JSON files for the processor that transformers has for the family: name -> content
    processor_files: Callable[[ConfigDict], dict[str, dict[str, Any]]] = lambda model: {}


def slice_shape(specs: Mapping[str, ParamSpec], path: str, at: int | None) -> Shape:
    """The shape of a parameter, or of one of its slices."""
    return specs[path].shape if at is None else specs[path].shape[1:]


def to_ours(specs: Mapping[str, ParamSpec], row: Row, tensor: np.ndarray) -> list[np.ndarray]:
    """The slices of our parameters (in the order of row.paths) that an HF tensor holds, in its dtype."""
    return TRANSFORMS[row.kind].to_ours(tensor, [slice_shape(specs, path, row.at) for path in row.paths])


def to_theirs(row: Row, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """The HF tensor of a row; it may be a view of the parameter."""
    whole = [np.asarray(params[path]) for path in row.paths]
    parts = whole if row.at is None else [x[row.at] for x in whole]
    return TRANSFORMS[row.kind].to_hf(parts, row.shape)


def from_hf(
    specs: Mapping[str, ParamSpec], rows: Iterable[Row], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our parameters, float32, from HF tensors held in memory.

    Raises:
        UserError: a tensor that is missing, left over or of another shape, named with both shapes.
    """
    rows = list(rows)
    check_names(rows, tensors)
    check_cover(specs, rows)
    params: dict[str, np.ndarray] = {path: np.empty(spec.shape, np.float32) for path, spec in specs.items()}
    for row in rows:
        check_shape(row, tensors[row.name].shape)
        for path, value in zip(row.paths, to_ours(specs, row, tensors[row.name]), strict=True):
            params[path][... if row.at is None else row.at] = value
    return params


def to_hf(rows: Iterable[Row], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All HF tensors from our parameters, in memory."""
    return {row.name: np.ascontiguousarray(to_theirs(row, params)) for row in rows}


def check_names(rows: Iterable[Row], names: Iterable[str]) -> None:
    """Raises UserError where a checkpoint's tensor names are not exactly those of the table."""
    wanted, found = {row.name for row in rows}, set(names)
    if missing := sorted(wanted - found):
        raise UserError(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}")
    if extra := sorted(found - wanted):
        raise UserError(f"the checkpoint has {len(extra)} tensors the config does not know, first {extra[0]}")


def check_shape(row: Row, shape: Sequence[int]) -> None:
    """Raises UserError, with both shapes, where a tensor is not shaped as its config says."""
    if tuple(shape) != row.shape:
        raise UserError(f"{row.name} has shape {tuple(shape)}, the config needs {row.shape}")


def check_cover(specs: Mapping[str, ParamSpec], rows: Iterable[Row]) -> None:
    """Raises ValueError where a table does not fill every parameter exactly once: a mistake in the table."""
    filled: dict[str, list[int | None]] = {path: [] for path in specs}
    for row in rows:
        for path in row.paths:
            if path not in filled:
                raise ValueError(f"{row.name}: the model has no parameter {path}")
            filled[path].append(row.at)
    for path, places in filled.items():
        if places != [None] and sorted(map(str, places)) != sorted(map(str, range(specs[path].shape[0]))):
            raise ValueError(f"the table fills {path} {specs[path].shape} at {places}")
