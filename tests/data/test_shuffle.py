import grain
import numpy as np

from jaxalope.data import shuffle
from jaxalope.data.shuffle import BlockShuffle, shuffled

SIZES = [4, 0, 7, 1, 5, 8]


def epochs(seed, count):
    dataset = BlockShuffle(grain.MapDataset.source(range(25)), SIZES, seed).repeat()
    return [[dataset[e * 25 + i] for i in range(25)] for e in range(count)]


def test_every_epoch_is_another_order_of_all_documents():
    orders = epochs(0, 3)
    assert all(sorted(order) == list(range(25)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epochs(0, 3) == orders
    assert epochs(1, 1) != orders[:1]


def test_blocks_stay_together():
    block_of = np.repeat(np.arange(len(SIZES)), SIZES)
    for order in epochs(3, 4):
        changes = np.count_nonzero(np.diff(block_of[order]))
        assert changes == sum(s > 0 for s in SIZES) - 1
        assert order != sorted(order)


class Letters:
    block_sizes = None

    def __len__(self):
        return 26

    def __getitem__(self, index):
        return chr(ord("a") + index)


def test_a_corpus_without_blocks_is_shuffled_whole(monkeypatch):
    # With a table of the order, and (as for a large corpus) without.
    for table in (26, 25):
        monkeypatch.setattr(shuffle, "_TABLE", table)
        dataset = shuffled(Letters(), 0).repeat()
        epochs = ["".join(dataset[e * 26 + i] for i in range(26)) for e in range(2)]
        assert [sorted(e) for e in epochs] == [sorted(map(chr, range(97, 123)))] * 2
        assert epochs[0] != epochs[1] and epochs[0] != "".join(sorted(epochs[0]))


def test_the_order_is_the_same_on_every_machine():
    # Written out once: a resumed run reads on where it was, with another numpy too.
    assert shuffle._order(10, 1, 2).tolist() == [7, 1, 3, 0, 4, 8, 9, 2, 6, 5]


def test_the_order_of_a_block_is_drawn_once_though_many_readers_are_in_many_blocks(monkeypatch):
    """Streams drift apart: 64 of them stand in more than a handful of blocks at once."""
    drawn = []
    real = BlockShuffle._make_within

    def draw(self, epoch, block):
        drawn.append((epoch, block))
        return real(self, epoch, block)

    monkeypatch.setattr(BlockShuffle, "_make_within", draw)
    dataset = BlockShuffle(grain.MapDataset.source(range(6400)), [100] * 64, 0)
    for i in range(100):
        for reader in range(64):
            dataset[(reader * 100 + i) % 6400]
    assert len(drawn) == 64
