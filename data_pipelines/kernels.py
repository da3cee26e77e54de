"""Pillow's resize compiled for this machine's vector instructions: the same values in a fifth of the time.

Pillow weighs 8-bit pixels by whole numbers of 22 binary digits, rounds, and clips to 8 bits after each of its
two passes. A sum of whole numbers does not depend on its order, so these loops run over neighbouring values
of a line, which the compiler turns into vector instructions; Pillow's run over the pixels that one value is
made of. Both passes go on together, line by line, and the second finds the first one's results in the cache.
Windows that reach out of the picture keep their length: there the weights are 0.

Importing this needs numba (extra `numba`), which keeps what it compiled on disk.
"""

import numba
import numpy as np

_BITS = 22  # of a weight
_HALF = np.int32(1 << (_BITS - 1))
_LEAST = 5  # weights per output that the loops take at once
_LANES = 64  # rows that are turned at once
_VECTOR = 8  # values that are taken at once even at the end of a run

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def resize(pixels: np.ndarray, out: np.ndarray, cubic: bool) -> None:
    """Resizes the width, then the height, and cuts the result into blocks.

    Args:
        pixels: uint8 [h, w, 3].
        out: uint8 [rows, cols, y, x * 3], takes a picture of rows * y by cols * x pixels.
        cubic: filter BICUBIC; else BILINEAR.
    """
    rows, cols, block_height, block_width = out.shape
    height, width, _ = pixels.shape
    lines, n = pixels.reshape(height, width * 3), cols * block_width
    first_x, weights_x = _taps(width, n // 3, cubic)
    first_y, weights_y = _taps(height, rows * block_height, cubic)
    border, starts = weights_x.shape[1], _runs(first_x)
    # Few jumps, that is a size which hardly changes: along the lines. Else across them.
    lanes = 1 if len(starts) * 6 < len(first_x) or n == width * 3 else _LANES
    if lanes == 1:
        weights_x = _spread(weights_x)
    scratch: np.ndarray = np.zeros((width + 2 * border + _VECTOR) * 3 * lanes, np.uint8)
    # Only the last lines of the new width are kept: line i is narrow[i % size].
    size, done = weights_y.shape[1] + lanes, 0
    narrow: np.ndarray = np.empty((size, n), np.uint8)
    sums: np.ndarray = np.empty(n + 3 * _VECTOR, np.int32)
    # A row of blocks: cut when it is whole, as memory is written faster one block after the other.
    strip: np.ndarray = np.empty((block_height, n), np.uint8)
    for y in range(rows * block_height):
        while done < min(first_y[y] + weights_y.shape[1], height):
            if n == width * 3:
                _copy(lines[done], narrow[done % size])
            elif lanes == 1:
                _copy(lines[done], scratch[3 * border :])
                _by_runs(scratch, starts, first_x + border, weights_x, sums)
                _clip(sums, narrow[done % size])
            else:
                _by_turning(lines[done : done + lanes], scratch, first_x + border, weights_x, narrow, done)
            done += lanes
        _weigh(narrow, first_y[y], weights_y[y], sums[:n])
        _clip(sums, strip[y % block_height])
        if (y + 1) % block_height == 0:
            for col in range(cols):
                for j in range(block_height):
                    part = strip[j, col * block_width : (col + 1) * block_width]
                    _copy(part, out[y // block_height, col, j])


@_compiled
def _taps(size: int, new_size: int, cubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """The antialiased filter: each output's first input, int64 [new_size], weights int32 [new_size, taps].

    Inputs before 0 and from `size` on have a weight of 0.
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    first: np.ndarray = np.empty(new_size, np.int64)
    taps = _LEAST
    for i in range(new_size):
        centre = (i + 0.5) * scale
        first[i] = int(np.floor(centre - support + 0.5))
        taps = max(taps, int(centre + support + 0.5) - int(first[i]))
    exact: np.ndarray = np.empty(taps)
    weights: np.ndarray = np.zeros((new_size, taps), np.int32)
    for i in range(new_size):
        centre, total = (i + 0.5) * scale, 0.0
        begin = max(-int(first[i]), 0)
        end = min(int(centre + support + 0.5), size) - int(first[i])
        for k in range(begin, end):
            x = abs((k + first[i] - centre + 0.5) * (1.0 / stretch))
            if not cubic:
                exact[k] = max(1.0 - x, 0.0)
            elif x < 1.0:
                exact[k] = (1.5 * x - 2.5) * x * x + 1
            else:
                exact[k] = (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0
            total += exact[k]
        for k in range(begin, end):
            weight = exact[k] / total * (1 << _BITS)
            weights[i, k] = int(weight + (0.5 if weight >= 0 else -0.5))
    return first, weights


@_compiled
def _runs(first: np.ndarray) -> np.ndarray:
    """Where runs of outputs start whose windows move by one input, then how many outputs: int64 [r + 1]."""
    starts: np.ndarray = np.empty(len(first) + 1, np.int64)
    count = 0
    for i in range(len(first)):
        if i == 0 or first[i] != first[i - 1] + 1:
            starts[count] = i
            count += 1
    starts[count] = len(first)
    return starts[: count + 1]


@_compiled
def _spread(weights: np.ndarray) -> np.ndarray:
    """int32 [n, taps] -> [taps, n * 3 + some], each three times."""
    out: np.ndarray = np.zeros((weights.shape[1], (len(weights) + _VECTOR) * 3), np.int32)
    for k in range(len(out)):
        for i in range(len(weights)):
            for colour in range(3):
                out[k, 3 * i + colour] = weights[i, k]
    return out


@_compiled
def _by_runs(
    line: np.ndarray, starts: np.ndarray, first: np.ndarray, weights: np.ndarray, sums: np.ndarray
) -> None:
    """sums[i] = half + weights[:, i] . line[window of i]; in a run, windows move on like the outputs.

    The last vector of a run may reach into the next one, which is written after it.
    """
    for r in range(len(starts) - 1):
        begin, end = 3 * int(starts[r]), 3 * int(starts[r + 1])
        count = (end - begin + _VECTOR - 1) // _VECTOR * _VECTOR
        window = line[3 * first[starts[r]] :]
        part = sums[begin : begin + count]
        wa, wb, wc = weights[0, begin:], weights[1, begin:], weights[2, begin:]
        wd, we = weights[3, begin:], weights[4, begin:]
        for j in range(count):
            i = np.uintp(j)  # with a sign, it could count from the end: no vectors then
            left = wa[i] * np.int32(window[i]) + wb[i] * np.int32(window[i + np.uintp(3)])
            right = wd[i] * np.int32(window[i + np.uintp(9)]) + we[i] * np.int32(window[i + np.uintp(12)])
            part[i] = _HALF + left + wc[i] * np.int32(window[i + np.uintp(6)]) + right
        for k in range(_LEAST, len(weights)):
            wa, a = weights[k, begin:], window[3 * k :]
            for j in range(count):
                part[j] += wa[j] * np.int32(a[j])


@_compiled
def _by_turning(
    lines: np.ndarray,
    scratch: np.ndarray,
    first: np.ndarray,
    weights: np.ndarray,
    narrow: np.ndarray,
    number: int,
) -> None:
    """For any sizes: up to _LANES lines are turned into columns, weighed, and turned back.

    They are written to narrow[number % size], ...; the borders of `scratch` are 0.
    """
    border = weights.shape[1]
    turned = scratch.reshape(3, -1, _LANES)
    done: np.ndarray = np.empty((narrow.shape[1], _LANES), np.uint8)
    sums: np.ndarray = np.empty(_LANES, np.int32)
    for j in range(len(lines)):
        for x in range(lines.shape[1] // 3):
            for colour in range(3):
                turned[colour, border + x, j] = lines[j, 3 * x + colour]
    for i in range(len(done)):
        _weigh(turned[i % 3], first[i // 3], weights[i // 3], sums)
        _clip(sums, done[i])
    for j in range(len(lines)):
        for i in range(len(done)):
            narrow[(number + j) % len(narrow), i] = done[i, j]


@_compiled
def _weigh(lines: np.ndarray, first: int, weights: np.ndarray, sums: np.ndarray) -> None:
    """sums[i] = half + weights . lines[first:, i], int32 [n]; the lines go round."""
    size = len(lines)
    a, b, c = lines[first % size], lines[(first + 1) % size], lines[(first + 2) % size]
    d, e = lines[(first + 3) % size], lines[(first + 4) % size]
    wa, wb, wc, wd, we = weights[0], weights[1], weights[2], weights[3], weights[4]
    for i in range(len(sums)):
        left = wa * np.int32(a[i]) + wb * np.int32(b[i])
        sums[i] = _HALF + left + wc * np.int32(c[i]) + wd * np.int32(d[i]) + we * np.int32(e[i])
    for k in range(_LEAST, len(weights)):
        wa, a = weights[k], lines[(first + k) % size]
        for i in range(len(sums)):
            sums[i] += wa * np.int32(a[i])


@_compiled
def _clip(sums: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        out[i] = min(max(sums[i] >> _BITS, 0), 255)


@_compiled
def _copy(line: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(line)):
        out[i] = line[i]
