"""A seeded order for corpora that are stored in blocks."""

import functools

import grain
import numpy as np


class BlockShuffle(grain.MapDataset):
    """Blocks in a random order, and the documents of each in a random order within it.

    A plain shuffle of a Parquet file would read a row group for every row. Every epoch (a multiple
    of the length) has an order of its own, fixed by `seed` and the epoch.
    """

    def __init__(self, parent: grain.MapDataset, block_sizes: list[int], seed: int):
        """Args: `block_sizes` sum to the parent's length."""
        super().__init__(parent)
        self._sizes = np.array([s for s in block_sizes if s], np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed = seed
        self._plan = functools.lru_cache(maxsize=4)(self._make_plan)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of an epoch, and where each begins in it."""
        last = len(self._sizes) - 1
        seed = (self._seed + epoch) % 2**32
        order = np.array(
            [
                grain.experimental.index_shuffle(b, max_index=last, seed=seed, rounds=4)
                for b in range(last + 1)
            ]
        )
        sizes = self._sizes[order]
        return order, np.cumsum(sizes) - sizes

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, index = divmod(index, len(self))
        order, starts = self._plan(epoch)
        rank = int(np.searchsorted(starts, index, side="right")) - 1
        block = int(order[rank])
        place = grain.experimental.index_shuffle(
            index - int(starts[rank]),
            max_index=int(self._sizes[block]) - 1,
            seed=(self._seed + epoch + block + 1) % 2**32,
            rounds=4,
        )
        return self._parent[epoch * len(self) + int(self._starts[block]) + place]
