"""Pillow's resize compiled for this machine's vector instructions: the same values in a fifth of the time.

Pillow weighs 8-bit pixels by whole numbers of 22 binary digits, rounds, and clips to 8 bits after each of its
two passes. A sum of whole numbers does not depend on its order, so these loops run over neighbouring values
of a line, which the compiler turns into vector instructions; Pillow's run over the pixels that one value is
made of. Importing this needs numba (extra `simd`), which keeps what it compiled on disk.
"""

import numba
import numpy as np

_BITS = 22  # of a weight
_HALF = np.int32(1 << (_BITS - 1))
_LEAST = 4  # weights per output that the loops take at once; pictures have at least as many rows and columns
_LANES = 64  # rows that are turned at once

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


def resize(pixels: np.ndarray, out: np.ndarray, cubic: bool) -> None:
    """Resizes the width, then the height, and cuts the result into blocks.

    Args:
        pixels: uint8 [h, w, 3], h and w at least 4.
        out: uint8 [rows, cols, y, x * 3], takes a picture of rows * y by cols * x pixels.
        cubic: filter BICUBIC; else BILINEAR.
    """
    rows, cols, block_height, block_width = out.shape
    height, width, _ = pixels.shape
    lines, n = pixels.reshape(height, width * 3), cols * block_width
    if n != width * 3:
        lines = _resize_width(lines, *_taps(width, n // 3, cubic))
    _resize_height(lines, out, *_taps(height, rows * block_height, cubic))


def _resize_width(lines: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint8 [h, w * 3] -> uint8 [h, n], n = new width * 3."""
    out: np.ndarray = np.empty((len(lines), len(first) * 3), np.uint8)
    # In a run of outputs whose windows move by one pixel, value i is made of the values i + some constants.
    jumps: np.ndarray = np.flatnonzero(np.diff(first) != 1) + 1
    if len(jumps) * 6 < len(first):
        begins: np.ndarray = np.append(0, jumps)
        ends: np.ndarray = np.append(jumps, len(first))
        spread = np.ascontiguousarray(np.repeat(weights, 3, axis=0).T)
        _by_runs(lines, out, begins * 3, ends * 3, first[begins] * 3, spread)
    else:
        _by_turning(lines, out, first, weights)
    return out


@_compiled
def _taps(size: int, new_size: int, cubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """The antialiased filter: each output's first input, int64 [new_size], weights int32 [new_size, taps]."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    first: np.ndarray = np.empty(new_size, np.int64)
    count: np.ndarray = np.empty(new_size, np.int64)
    for i in range(new_size):
        centre = (i + 0.5) * scale
        first[i] = max(int(centre - support + 0.5), 0)
        count[i] = min(int(centre + support + 0.5), size) - first[i]
    taps = max(count.max(), _LEAST)
    exact: np.ndarray = np.empty(taps)
    weights: np.ndarray = np.zeros((new_size, taps), np.int32)
    for i in range(new_size):
        centre, total = (i + 0.5) * scale, 0.0
        for k in range(count[i]):
            x = abs((k + first[i] - centre + 0.5) * (1.0 / stretch))
            if not cubic:
                exact[k] = max(1.0 - x, 0.0)
            elif x < 1.0:
                exact[k] = (1.5 * x - 2.5) * x * x + 1
            else:
                exact[k] = (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0
            total += exact[k]
        begin = min(first[i], size - taps)  # at the border the window stays inside, with weights of 0
        for k in range(count[i]):
            weight = exact[k] / total * (1 << _BITS)
            weights[i, first[i] - begin + k] = int(weight + (0.5 if weight >= 0 else -0.5))
        first[i] = begin
    return first, weights


@_compiled
def _resize_height(lines: np.ndarray, out: np.ndarray, first: np.ndarray, weights: np.ndarray) -> None:
    """uint8 [h, n] -> uint8 [rows, cols, y, m]: rows * y lines of cols * m = n values."""
    rows, cols, block_height, block_width = out.shape
    sums: np.ndarray = np.empty(lines.shape[1], np.int32)
    for y in range(rows * block_height):
        _weigh(lines[first[y] :], weights[y], sums)
        for col in range(cols):
            start = col * block_width
            _clip(sums[start : start + block_width], out[y // block_height, col, y % block_height])


@_compiled
def _by_runs(
    lines: np.ndarray,
    out: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
    starts: np.ndarray,
    weights: np.ndarray,
) -> None:
    """For sizes that hardly change: along the lines; run r is out[:, begins[r] : ends[r]].

    Its windows begin at lines[:, starts[r] :]; weights: int32 [taps, n].
    """
    sums: np.ndarray = np.empty(out.shape[1], np.int32)
    for y in range(len(lines)):
        for r in range(len(begins)):
            begin, end = begins[r], ends[r]
            part, line = sums[begin:end], lines[y, starts[r] :]
            a, b, c, d = line, line[3:], line[6:], line[9:]
            wa, wb, wc, wd = weights[0, begin:], weights[1, begin:], weights[2, begin:], weights[3, begin:]
            for i in range(end - begin):
                left = wa[i] * np.int32(a[i]) + wb[i] * np.int32(b[i])
                part[i] = _HALF + left + wc[i] * np.int32(c[i]) + wd[i] * np.int32(d[i])
            for k in range(_LEAST, len(weights)):
                wa, a = weights[k, begin:], line[3 * k :]
                for i in range(end - begin):
                    part[i] += wa[i] * np.int32(a[i])
        _clip(sums, out[y])


@_compiled
def _by_turning(lines: np.ndarray, out: np.ndarray, first: np.ndarray, weights: np.ndarray) -> None:
    """For any sizes: _LANES lines at a time are turned into columns, weighed, and turned back."""
    width = lines.shape[1] // 3
    turned: np.ndarray = np.zeros((3, width, _LANES), np.uint8)
    done: np.ndarray = np.empty((out.shape[1], _LANES), np.uint8)
    sums: np.ndarray = np.empty(_LANES, np.int32)
    for y in range(0, len(lines), _LANES):
        rows = min(_LANES, len(lines) - y)
        for j in range(rows):
            for x in range(width):
                for colour in range(3):
                    turned[colour, x, j] = lines[y + j, 3 * x + colour]
        for i in range(out.shape[1]):
            _weigh(turned[i % 3, first[i // 3] :], weights[i // 3], sums)
            _clip(sums, done[i])
        for j in range(rows):
            for i in range(out.shape[1]):
                out[y + j, i] = done[i, j]


@_compiled
def _weigh(lines: np.ndarray, weights: np.ndarray, sums: np.ndarray) -> None:
    """sums[i] = half + weights . lines[:, i], int32 [n]."""
    a, b, c, d = lines[0], lines[1], lines[2], lines[3]
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for i in range(len(sums)):
        left = wa * np.int32(a[i]) + wb * np.int32(b[i])
        sums[i] = _HALF + left + wc * np.int32(c[i]) + wd * np.int32(d[i])
    for k in range(_LEAST, len(weights)):
        wa, a = weights[k], lines[k]
        for i in range(len(sums)):
            sums[i] += wa * np.int32(a[i])


@_compiled
def _clip(sums: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        out[i] = min(max(sums[i] >> _BITS, 0), 255)
