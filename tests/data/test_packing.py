import json

import grain
import numpy as np
import pytest

from jaxalope.data.packing import PackIterDataset, Tokens
from jaxalope.errors import InputError


def stream(lengths, *, packing, length, repeat=False):
    """Rows of documents of these lengths; token ids are unique over the documents."""
    starts = np.cumsum([0, *lengths])
    documents = [
        Tokens(f"d{i}", np.arange(starts[i], starts[i + 1], dtype=np.int32) + 1)
        for i in range(len(lengths))
    ]
    dataset = grain.MapDataset.source(documents)
    dataset = dataset.repeat() if repeat else dataset
    return PackIterDataset(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=0)), packing, length, 0
    )


def lists(row):
    return [row.tokens.tolist(), row.segment_ids.tolist(), row.positions.tolist()]


def check_row(row):
    """What must hold for a row of any packing."""
    used = row.segment_ids > 0
    assert all(x.dtype == np.int32 for x in row[:3])
    assert (np.diff(used.astype(int)) <= 0).all()  # Padding only at the end.
    assert (row.tokens[~used] == 0).all() and (row.positions[~used] == 0).all()
    count = row.segment_ids.max()
    assert np.array_equal(np.unique(row.segment_ids[used]), np.arange(1, count + 1))
    assert len(row.pieces) == count
    for segment in range(1, count + 1):
        inside = row.segment_ids == segment
        assert np.array_equal(row.positions[inside], np.arange(inside.sum()))
        assert (np.diff(row.tokens[inside]) == 1).all()  # One run of one document.


def test_concat_by_hand():
    rows = [lists(r) for r in stream([3, 6, 0, 2, 5], packing="concat", length=4)]
    assert rows == [
        [[1, 2, 3, 4], [1, 1, 1, 2], [0, 1, 2, 0]],
        [[5, 6, 7, 8], [1, 1, 1, 1], [0, 1, 2, 3]],
        [[9, 10, 11, 12], [1, 2, 2, 3], [0, 0, 1, 0]],
        [[13, 14, 15, 16], [1, 1, 1, 1], [0, 1, 2, 3]],
    ]


def test_concat_pads_only_the_last_row():
    rows = list(stream([3, 2], packing="concat", length=4))
    assert lists(rows[0]) == [[1, 2, 3, 4], [1, 1, 1, 2], [0, 1, 2, 0]]
    assert lists(rows[1]) == [[5, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert [r.pieces for r in rows] == [(("d0", 0), ("d1", 0)), (("d1", 1),)]


def test_first_fit_by_hand():
    # 3 opens a row, 9 = 4 + 4 + 1 opens two and fills up the first, 2 opens the fourth.
    rows = [lists(r) for r in stream([3, 9, 0, 2], packing="first_fit", length=4)]
    assert rows == [
        [[1, 2, 3, 12], [1, 1, 1, 2], [0, 1, 2, 0]],
        [[4, 5, 6, 7], [1, 1, 1, 1], [0, 1, 2, 3]],
        [[8, 9, 10, 11], [1, 1, 1, 1], [0, 1, 2, 3]],
        [[13, 14, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]],
    ]


LENGTHS = np.random.default_rng(0).integers(0, 30, 200).tolist()


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_every_token_comes_once(packing):
    rows = list(stream(LENGTHS, packing=packing, length=11))
    for row in rows:
        check_row(row)
    tokens = np.concatenate([r.tokens[r.segment_ids > 0] for r in rows])
    expected = np.arange(1, sum(LENGTHS) + 1)
    assert np.array_equal(tokens if packing == "concat" else np.sort(tokens), expected)
    if packing == "first_fit":
        ends = np.cumsum(LENGTHS)
        for size, end in zip(LENGTHS, ends, strict=True):
            if 0 < size <= 11:  # Stays whole: its first and last token are in one row.
                assert sum(end in r.tokens and end - size + 1 in r.tokens for r in rows) == 1
        assert np.mean([np.mean(r.segment_ids > 0) for r in rows]) > 0.85


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("length", [3, 11, 40])
def test_the_state_is_exact_after_every_row_and_through_json(packing, length):
    dataset = stream([5, 0, 11, 3, 22, 11, 7], packing=packing, length=length, repeat=True)
    straight = iter(dataset)
    expected, states = [], []
    for _ in range(60):
        states.append(json.dumps(straight.get_state()))
        expected.append(next(straight))
    for n, state in enumerate(states[:50]):
        resumed = iter(dataset)
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        for row in expected[n : n + 10]:
            again = next(resumed)
            assert lists(again) == lists(row) and again.pieces == row.pieces


def test_going_back_on_a_used_iterator():
    iterator = iter(stream(LENGTHS, packing="first_fit", length=11))
    state = iterator.get_state()
    first = [lists(next(iterator)) for _ in range(21)]
    iterator.set_state(state)
    assert [lists(next(iterator)) for _ in range(21)] == first


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_a_shorter_document_than_the_state_knows_is_an_error(packing):
    iterator = iter(stream([30, 30], packing=packing, length=4))
    for _ in range(10):
        next(iterator)
    other = iter(stream([2, 2], packing=packing, length=4))
    other.set_state(iterator.get_state())
    with pytest.raises((InputError, StopIteration)):
        next(other)
    if packing == "concat":
        other.set_state({"documents": {"next_index": 0}, "offset": 5})
        with pytest.raises(InputError, match="d0 has 2 tokens, and 5 of them were used"):
            next(other)


def test_documents_without_a_token_end_in_an_error(monkeypatch):
    monkeypatch.setattr("jaxalope.data.packing._MOST_EMPTY_DOCUMENTS", 50)
    with pytest.raises(InputError, match="50 documents in a row are empty"):
        next(iter(stream([0, 0], packing="concat", length=4, repeat=True)))
