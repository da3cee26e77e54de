"""The order of a source's records: random access to an endless shuffled sequence, epoch after epoch."""

import functools

import numpy as np

BLOCKS_AT_ONCE = 8  # blocks whose records are mixed with each other; a source keeps as many in memory
_SHORT = 1 << 16  # below this `index_shuffle` is slow, milliseconds per index for tens of records


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
        self._arguments = (length, seed, blocks)
        self._length, self._seed = length, seed
        if blocks is None and length < _SHORT:
            blocks = np.array([0, length])
        self._blocks = blocks
        self._epoch = functools.lru_cache(maxsize=2)(self._order_blocks)
        self._group = functools.lru_cache(maxsize=4)(self._order_group)

    def __call__(self, place: int) -> int:
        epoch, place = divmod(place, self._length)
        if self._seed is None:
            return place
        if self._blocks is None:
            from grain.experimental import index_shuffle  # here: Grain imports JAX, which configs do without

            return index_shuffle(
                place, max_index=self._length - 1, seed=(self._seed + epoch) % 2**32, rounds=4
            )
        starts = self._epoch(epoch)[1]
        group = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self._group(epoch, group)[place - starts[group]])

    def _order_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the blocks, and the place where each group of them starts."""
        assert self._blocks is not None
        order = np.random.default_rng([self._seed or 0, epoch]).permutation(len(self._blocks) - 1)
        sizes = np.diff(self._blocks)[order]
        starts: np.ndarray = np.append(0, np.cumsum(sizes))[:-1][::BLOCKS_AT_ONCE]
        return order, starts

    def _order_group(self, epoch: int, group: int) -> np.ndarray:
        """The records of one group of blocks, shuffled."""
        assert self._blocks is not None
        order, _ = self._epoch(epoch)
        blocks = order[group * BLOCKS_AT_ONCE : (group + 1) * BLOCKS_AT_ONCE]
        records = np.concatenate([np.arange(self._blocks[b], self._blocks[b + 1]) for b in blocks])
        return np.random.default_rng([self._seed or 0, epoch, group]).permutation(records)

    def __reduce__(self) -> tuple[type["Order"], tuple[int, int | None, np.ndarray | None]]:
        return Order, self._arguments
