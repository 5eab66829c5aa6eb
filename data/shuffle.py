"""A seeded order of the documents of a corpus, a new one every epoch."""

import functools

import grain
import numpy as np

from .cache import ByteCache
from .documents import Source

# Below this Grain's shuffle, which walks cycles in a domain of 2**16, costs up to 10 ms an index
# (measured with grain 0.2.18); above it a table of the order would be the larger part of memory.
_TABLE = 1 << 16


def _order(count: int, *seed: int) -> np.ndarray:
    """A permutation of `count`. The bits of a seeded Philox never change between numpy versions."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


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
        self._blocks = functools.lru_cache(maxsize=4)(self._make_blocks)
        # Streams drift apart, and stand in about as many blocks as there are of them.
        self._within = ByteCache(256 << 20)

    def _make_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of an epoch, and where each begins in it."""
        order = _order(len(self._sizes), self._seed, epoch)
        sizes = self._sizes[order]
        return order, np.cumsum(sizes) - sizes

    def _make_within(self, epoch: int, block: int) -> np.ndarray:
        return _order(int(self._sizes[block]), self._seed, epoch, block)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, index = divmod(index, len(self))
        blocks, starts = self._blocks(epoch)
        rank = int(np.searchsorted(starts, index, side="right")) - 1
        block = int(blocks[rank])
        order = self._within.get((epoch, block), lambda: self._make_within(epoch, block))
        place = order[index - starts[rank]]
        return self._parent[epoch * len(self) + int(self._starts[block] + place)]


def shuffled(source: Source, seed: int) -> grain.MapDataset:
    """The documents of `source` in a seeded order, block by block if they are stored so."""
    documents = grain.MapDataset.source(source)
    if source.block_sizes is not None:
        return BlockShuffle(documents, list(source.block_sizes), seed)
    if len(source) <= _TABLE:
        return BlockShuffle(documents, [len(source)], seed)
    return documents.shuffle(seed=seed)
