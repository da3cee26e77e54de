"""Counts and histograms of documents, kept per shard and added up in the manifest."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

BINS_PER_OCTAVE = 4  # of a histogram: bin k holds 2**(k/4) <= value < 2**((k+1)/4); "zero" holds 0


class Statistics:
    """Totals and histograms of named quantities; equal contents give equal JSON."""

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()
        self._histograms: dict[str, Counter[str]] = {}

    def count(self, name: str, number: int = 1) -> None:
        self._totals[name] += number

    def observe(self, name: str, value: float) -> None:
        """Adds a value >= 0 to the histogram of `name`."""
        self._histograms.setdefault(name, Counter())[_bin(value)] += 1

    def to_json(self) -> dict[str, Any]:
        """{"totals": {name: sum}, "histograms": {name: {bin: number of values}}}"""
        return {
            "totals": dict(sorted(self._totals.items())),
            "histograms": {
                name: dict(sorted(histogram.items(), key=lambda item: _bin_key(item[0])))
                for name, histogram in sorted(self._histograms.items())
            },
        }


def add_up(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of several shards together."""
    whole = Statistics()
    for part in parts:
        whole._totals.update(part["totals"])
        for name, histogram in part["histograms"].items():
            whole._histograms.setdefault(name, Counter()).update(histogram)
    return whole.to_json()


def bin_edges(bin_: str) -> tuple[float, float]:
    """(lower, upper edge) of a bin."""
    if bin_ == "zero":
        return 0.0, 0.0
    return 2 ** (int(bin_) / BINS_PER_OCTAVE), 2 ** ((int(bin_) + 1) / BINS_PER_OCTAVE)


def _bin(value: float) -> str:
    # The small number keeps powers of two in the bin that they begin.
    return str(math.floor(BINS_PER_OCTAVE * math.log2(value) + 1e-9)) if value else "zero"


def _bin_key(bin_: str) -> float:
    return -math.inf if bin_ == "zero" else int(bin_)
