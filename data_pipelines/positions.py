"""Coordinates (t, h, w) of every token of one document, by `config.model.coords.kind`.

t starts at 0 in every document. An image is a run of positions with one number in `image_ids`: its patches
and the slots and separators between them.
"""

from collections.abc import Callable

import numpy as np

# image_ids int32 [n], hw int32 [n, 2] (rows and columns inside images, 0 elsewhere), delta -> float32 [n, 3]
Positions = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def one_d(image_ids: np.ndarray, hw: np.ndarray, delta: float) -> np.ndarray:
    """Every token moves t by one, image tokens like text."""
    return _with_t(np.arange(len(image_ids)))


def thw(image_ids: np.ndarray, hw: np.ndarray, delta: float) -> np.ndarray:
    """NEO: text moves t by one, an image as a whole by one; h and w are its rows and columns."""
    in_image, first, _ = _runs(image_ids)
    coords: np.ndarray = np.empty((len(image_ids), 3), np.float32)
    coords[:, 0] = (~in_image | first).cumsum() - 1
    coords[:, 1:] = hw
    return coords


def mrope(image_ids: np.ndarray, hw: np.ndarray, delta: float) -> np.ndarray:
    """Qwen2-VL: text moves all three by one; in an image they are its start plus (0, row, column).

    The text behind it goes on one above the largest of them.
    """
    in_image, _, last = _runs(image_ids)
    sizes: np.ndarray = np.zeros(image_ids.max(initial=0) + 1, int)
    np.maximum.at(sizes, image_ids, hw.max(axis=1, initial=0) + 1)
    steps = np.where(in_image, np.where(last, sizes[image_ids], 0), 1)
    coords: np.ndarray = np.repeat((np.cumsum(steps) - steps).astype(np.float32)[:, None], 3, axis=1)
    coords[:, 1:] += hw
    return coords


def v2pe(image_ids: np.ndarray, hw: np.ndarray, delta: float) -> np.ndarray:
    """V2PE (Ge et al. 2024): text moves t by one, image tokens by `delta`; text goes on at a whole number.

    Images with nothing between them, as the tiles of one picture, go on without a break.
    """
    in_image, first, last = _runs((image_ids > 0).astype(int))
    place = np.arange(len(image_ids))
    starts = np.maximum.accumulate(np.where(first, place, 0))  # of the run a position is in
    number = place - starts + 1  # 1 for its first token
    whole = np.ceil(np.round(number * delta, 6))  # 10 steps of 0.1 are one
    steps = np.where(in_image, np.where(last, whole, 0), 1)
    before = np.cumsum(steps) - steps
    return _with_t(np.where(in_image, before - 1 + number * delta, before))


POSITIONS: dict[str, Positions] = {"1d": one_d, "thw": thw, "thw_split": thw, "mrope": mrope, "v2pe": v2pe}


def _runs(image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns bool [n]: inside an image, its first position, its last position."""
    in_image = image_ids > 0
    changes: np.ndarray = np.ones(len(image_ids) + 1, bool)
    np.not_equal(image_ids[1:], image_ids[:-1], out=changes[1:-1])
    return in_image, in_image & changes[:-1], in_image & changes[1:]


def _with_t(t: np.ndarray) -> np.ndarray:
    coords: np.ndarray = np.zeros((len(t), 3), np.float32)
    coords[:, 0] = t
    return coords
