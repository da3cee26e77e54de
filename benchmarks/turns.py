"""Times of contenders that take turns in one process: what else the machine does hits them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

REPEATS = 5


def seconds(contenders: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each contender over `repeats` turns, after one that warms up.

    A contender returns when its work is done.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}
