"""Mixtures: which source the next document comes from, by weights that may change with the step."""

from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.errors import DataError

TRAIN = "train"  # the split that a mixture is of
ALL = "all"  # the mixture entry that stands for every source by its size
Weight = float | Sequence[Sequence[float]]  # constant, or (step, weight) pairs: linear between them


class Mixture:
    """Weights of named sources as functions of the step.

    Args:
        weights: source -> a number, or (step, weight) pairs in order of their steps. Between two pairs the
            weight is linear, before the first and after the last constant.
    """

    def __init__(self, weights: Mapping[str, Weight]):
        self.names = list(weights)
        self._ramps = [_ramp(name, weight) for name, weight in weights.items()]

    def at(self, step: float) -> np.ndarray:
        """Returns each source's share of the documents at a step, float64, in sum 1.

        Raises DataError if no source has a weight there.
        """
        weights = np.array([np.interp(step, steps, values) for steps, values in self._ramps])
        if weights.sum() <= 0:
            raise DataError(f"mixture: needs a source with a positive weight at step {step:g}")
        return weights / weights.sum()


def _ramp(name: str, weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """Steps and weights. Raises DataError if they are not what `Mixture` says."""
    pairs = np.array([(0, weight)] if isinstance(weight, int | float) else weight, float)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.isfinite(pairs).all() or (pairs < 0).any():
        raise DataError(
            f"mixture.{name}: {weight!r} is neither a number nor (step, weight) pairs of at least 0"
        )
    if (np.diff(pairs[:, 0]) <= 0).any():
        raise DataError(f"mixture.{name}: the steps of {weight!r} do not increase")
    return pairs[:, 0], pairs[:, 1]


def deal(shares: np.ndarray, credit: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals the next `count` documents out to sources, as evenly as whole numbers allow.

    Every document adds its share to each credit; the source with the most gives the document and pays 1.
    So after any number of documents each source has given its share, to within one document.

    Args:
        shares: [S], in sum 1.
        credit: [S], what earlier documents left over.

    Returns:
        (sources int [count], credit [S]).
    """
    credit = credit.copy()
    sources: np.ndarray = np.empty(count, int)
    for i in range(count):
        credit += shares
        sources[i] = best = credit.argmax()
        credit[best] -= 1
    return sources, credit


def by_size(weights: Mapping[str, Weight], sizes: Mapping[str, int]) -> dict[str, Weight]:
    """Replaces the entry ALL by all sources, each by its number of records.

    Args:
        weights: source or ALL -> weight.
        sizes: number of records of every source.

    Raises:
        DataError: for a name that is no source, or a source that is named beside ALL.
    """
    for name in weights:
        if name not in (ALL, *sizes):
            raise DataError(f"mixture: no source {name!r}; sources are {ALL}, {', '.join(sizes)}")
    if ALL not in weights:
        return dict(weights)
    if len(weights) > 1:
        raise DataError(f"mixture: {ALL!r} stands for every source; name it alone, or the sources")
    total = sum(sizes.values())
    return {name: size / total for name, size in sizes.items()}
