"""Times of contenders that take turns in one process: what else the machine does hits them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

REPEATS = 5


class Spent(NamedTuple):
    """Median seconds of a contender."""

    wall: float
    cpu: float  # of all threads: on a busy machine a better measure of work, but blind to idle cores


def take(contenders: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, Spent]:
    """What each contender spends, over `repeats` turns after one that warms up.

    A contender returns when its work is done.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Spent(*(statistics.median(clock) for clock in zip(*spent, strict=True)))
        for name, spent in times.items()
    }
