"""The order of a source's records: random access to an endless shuffled sequence, epoch after epoch."""

import functools

import grain
import numpy as np

BLOCKS_AT_ONCE = 8  # blocks whose records are mixed with each other; a source keeps as many in memory


class Order:
    """Place in the stream -> number of the record. Every epoch holds every record once, in its own order.

    Without blocks the shuffle is a permutation computed per index (Grain's `index_shuffle`): no memory, no
    start-up. With blocks, the blocks are shuffled over the whole source and the records within groups of
    BLOCKS_AT_ONCE of them, so that each block is read once per epoch.

    Args:
        length: number of records, below 2**32.
        seed: below 2**32; None keeps the stored order.
        blocks: int64 [n + 1], bounds of what is read together, or None.
    """

    def __init__(self, length: int, seed: int | None, blocks: np.ndarray | None = None):
        self._length, self._seed = length, seed
        self._blocks = None if blocks is None or len(blocks) < 3 else blocks

    def __call__(self, place: int) -> int:
        epoch, place = divmod(place, self._length)
        if self._seed is None:
            return place
        if self._blocks is None:
            return grain.experimental.index_shuffle(
                place, max_index=self._length - 1, seed=(self._seed + epoch) % 2**32, rounds=4
            )
        starts = self._epoch(epoch)[1]
        group = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self._group(epoch, group)[place - starts[group]])

    @functools.lru_cache(maxsize=2)  # noqa: B019  an order lives as long as its process
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the blocks, and the place where each group of them starts."""
        assert self._blocks is not None
        order = np.random.default_rng([self._seed or 0, epoch]).permutation(len(self._blocks) - 1)
        sizes = np.diff(self._blocks)[order]
        starts: np.ndarray = np.append(0, np.cumsum(sizes))[:-1][::BLOCKS_AT_ONCE]
        return order, starts

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _group(self, epoch: int, group: int) -> np.ndarray:
        """The records of one group of blocks, shuffled."""
        assert self._blocks is not None
        order, _ = self._epoch(epoch)
        blocks = order[group * BLOCKS_AT_ONCE : (group + 1) * BLOCKS_AT_ONCE]
        records = np.concatenate([np.arange(self._blocks[b], self._blocks[b + 1]) for b in blocks])
        return np.random.default_rng([self._seed or 0, epoch, group]).permutation(records)
