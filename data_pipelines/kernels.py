"""Pillow's resize compiled for this machine's vector instructions: the same values in an eighth of the time.

Pillow weighs 8-bit pixels by whole numbers of 22 binary digits, rounds, and clips to 8 bits after each of its
two passes. A sum of whole numbers does not depend on its order, so these loops run over neighbouring values
of a line, which the compiler turns into vector instructions; Pillow's run over the pixels that one value is
made of. Both passes go on together, line by line, and the second finds the first one's results in the cache.
Windows that reach out of the picture keep their length: there the weights are 0. Reading and writing is what
takes time, so both passes round to 8 bits at once, and the first weighs two lines with weights loaded once.

Importing this needs numba (extra `numba`), which keeps what it compiled on disk.
"""

import numba
import numpy as np

_BITS = 22  # of a weight
_HALF = np.int32(1 << (_BITS - 1))
_LEAST = 5  # weights per output that the loops take at once
_PAIR = 2  # lines that are weighed at once where runs are long
_LANES = 64  # lines that are turned at once elsewhere
_VECTOR = 16  # values that are taken at once even at the end of a run

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
    # Few jumps, that is a size which hardly changes (so five weights do): along the lines. Else across them.
    lanes = _PAIR if len(_runs(first_x)) * 6 < len(first_x) else _LANES
    last = (height - 1) // lanes * lanes  # where the last lanes start
    if lanes == _PAIR:
        first_x, weights_x = _inside(first_x, weights_x, width)
        # A run reads a little further than its windows: room for that behind a copy of the last pair.
        scratch: np.ndarray = np.zeros((lanes, width * 3 + _VECTOR), np.uint8)
        for j in range(height - last):
            _copy(lines[last + j], scratch[j])
    else:
        scratch = np.zeros((lanes, (width + 2 * weights_x.shape[1]) * 3), np.uint8)
    starts = _runs(first_x)
    # Only the last lines of the new width are kept: line i is narrow[i % size].
    size, done = weights_y.shape[1] + lanes, 0
    narrow: np.ndarray = np.empty((size, n + _VECTOR), np.uint8)
    if n == width * 3:
        narrow, size, done = lines, height, height
    sums: np.ndarray = np.empty(n, np.int32)
    # A row of blocks: cut when it is whole, as memory is written faster one block after the other.
    strip: np.ndarray = np.empty((block_height, n), np.uint8)
    for y in range(rows * block_height):
        while done < min(first_y[y] + weights_y.shape[1], height):
            if lanes == _PAIR:
                pair = lines[done : done + lanes] if done < last else scratch
                _by_runs(pair, starts, first_x, weights_x, narrow[done % size], narrow[(done + 1) % size])
            else:
                _by_turning(lines[done : done + lanes], scratch, first_x, weights_x, narrow, done)
            done += lanes
        _weigh(narrow, first_y[y], weights_y[y], sums, strip[y % block_height])
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
def _inside(first: np.ndarray, weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Moves windows that reach out of the picture inside.

    Returns their first inputs and the weights as int32 [taps, n * 3 + some], each three times.
    """
    n, taps = weights.shape
    moved: np.ndarray = np.empty(n, np.int64)
    out: np.ndarray = np.zeros((taps, n * 3 + _VECTOR), np.int32)
    for i in range(n):
        moved[i] = min(max(first[i], 0), size - taps)
        by = moved[i] - first[i]
        for k in range(max(0, -by), min(taps, taps - by)):
            for colour in range(3):
                out[k, 3 * i + colour] = weights[i, k + by]
    return moved, out


@_compiled
def _by_runs(
    lines: np.ndarray,
    starts: np.ndarray,
    first: np.ndarray,
    weights: np.ndarray,
    out_p: np.ndarray,
    out_q: np.ndarray,
) -> None:
    """Two lines, whose runs move on like the outputs: out[i] = weights[:, i] . line[window of i].

    The last vector of a run reaches into the next one, which is written after it.
    """
    for r in range(len(starts) - 1):
        begin, end = 3 * int(starts[r]), 3 * int(starts[r + 1])
        count = (end - begin + _VECTOR - 1) // _VECTOR * _VECTOR
        p, q = lines[0][3 * first[starts[r]] :], lines[1][3 * first[starts[r]] :]
        to_p, to_q = out_p[begin:], out_q[begin:]
        wa, wb, wc = weights[0][begin:], weights[1][begin:], weights[2][begin:]
        wd, we = weights[3][begin:], weights[4][begin:]
        for j in range(count):
            a = np.uintp(j)  # with a sign, it could count from the end: no vectors then
            b, c, d, e = a + np.uintp(3), a + np.uintp(6), a + np.uintp(9), a + np.uintp(12)
            va, vb, vc, vd, ve = wa[a], wb[a], wc[a], wd[a], we[a]
            to_p[a] = _clip(_sum(va, vb, vc, vd, ve, p[a], p[b], p[c], p[d], p[e]))
            to_q[a] = _clip(_sum(va, vb, vc, vd, ve, q[a], q[b], q[c], q[d], q[e]))


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
    done: np.ndarray = np.empty((3 * len(weights), _LANES), np.uint8)
    sums: np.ndarray = np.empty(_LANES, np.int32)
    for j in range(len(lines)):
        for x in range(lines.shape[1] // 3):
            for colour in range(3):
                turned[colour, border + x, j] = lines[j, 3 * x + colour]
    for i in range(len(done)):
        _weigh(turned[i % 3], border + first[i // 3], weights[i // 3], sums, done[i])
    for j in range(len(lines)):
        for i in range(len(done)):
            narrow[(number + j) % len(narrow), i] = done[i, j]


@_compiled
def _weigh(lines: np.ndarray, first: int, weights: np.ndarray, sums: np.ndarray, out: np.ndarray) -> None:
    """out[i] = weights . lines[first:, i]; the lines go round. `sums`: scratch, int32 [len(out)]."""
    size = len(lines)
    a, b, c = lines[first % size], lines[(first + 1) % size], lines[(first + 2) % size]
    d, e = lines[(first + 3) % size], lines[(first + 4) % size]
    wa, wb, wc, wd, we = weights[0], weights[1], weights[2], weights[3], weights[4]
    if len(weights) == _LEAST:
        for i in range(len(out)):
            out[i] = _clip(_sum(wa, wb, wc, wd, we, a[i], b[i], c[i], d[i], e[i]))
        return
    for i in range(len(out)):
        sums[i] = _sum(wa, wb, wc, wd, we, a[i], b[i], c[i], d[i], e[i])
    for k in range(_LEAST, len(weights)):
        wa, a = weights[k], lines[(first + k) % size]
        for i in range(len(out)):
            sums[i] += wa * np.int32(a[i])
    for i in range(len(out)):
        out[i] = _clip(sums[i])


@_compiled
def _sum(wa: int, wb: int, wc: int, wd: int, we: int, a: int, b: int, c: int, d: int, e: int) -> np.int32:
    """Half, so that `_clip` rounds, and the weighed values. In 32 bits: vectors of 64 hold half as many."""
    left = wa * np.int32(a) + wb * np.int32(b) + wc * np.int32(c)
    return np.int32(_HALF + left + (wd * np.int32(d) + we * np.int32(e)))


@_compiled
def _clip(total: np.int32) -> np.int32:
    return np.int32(min(max(total >> _BITS, 0), 255))


@_compiled
def _copy(line: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(line)):
        out[i] = line[i]
