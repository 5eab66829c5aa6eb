"""Packed rows taken apart, and the positions that are scored."""

import dataclasses

import numpy as np
import pytest
from vector_toys import sum_model

from jaxalope import InputError
from jaxalope.evals.documents import batches_of, documents_of, starts_of, unpack
from jaxalope.model.calm import CALMConfig


def test_packed_rows_hold_their_documents():
    tokens = np.array([[1, 2, 3, 4, 5, 6, 9], [7, 8, 9, 9, 9, 9, 9]])
    segments = np.array([[1, 1, 2, 2, 1, 0, 1], [0, 5, 0, 5, 0, 0, 0]])
    found = [row.tolist() for row in unpack({"tokens": tokens, "segment_ids": segments})]
    # The same id again is another document; padding inside one is left out.
    assert found == [[1, 2], [3, 4], [5, 9], [8, 9]]
    rows = documents_of(None, [[1, 2, 3], {"tokens": tokens}, []], max_length=5)
    assert [len(row) for row in rows] == [3, 5, 2, 5, 2]


@dataclasses.dataclass
class Ids:
    pad_id: int | None
    eos_id: int | None


def test_what_fills_a_document_up_is_no_text():
    """``data.align`` gives documents whole chunks; a pad inside a text stays."""
    config = dataclasses.replace(CALMConfig.tiny(), head_layers=1)
    model = dataclasses.replace(sum_model(4), config=config, tokenizer=Ids(None, None))
    assert (config.pad_token_id, config.eos_token_id) == (256, 258)
    texts = [[1, 256, 2, 258, 256, 256], [3], [256, 256]]
    assert [d.tolist() for d in documents_of(model, texts)] == [[1, 256, 2, 258], [3]]
    own = dataclasses.replace(model, tokenizer=Ids(2, 258))
    assert [d.tolist() for d in documents_of(own, [[1, 2, 3, 2, 2]])] == [[1, 2, 3]]
    # One id for both: what ends a text is text.
    both = dataclasses.replace(model, tokenizer=Ids(2, 2))
    assert [d.tolist() for d in documents_of(both, [[1, 2, 3, 2]])] == [[1, 2, 3, 2]]


def test_all_starts_have_a_unit_before_them_and_end_inside():
    assert starts_of(9, 1, None, 0).tolist() == [1, 2, 3, 4, 5]
    assert starts_of(5, 1, None, 0).tolist() == [1]
    assert starts_of(4, 1, None, 0).tolist() == []
    # Chunks of two: the n-gram from token 6 on is the last of ten tokens.
    assert starts_of(10, 2, None, 0).tolist() == [1, 2, 3]
    assert starts_of(9, 2, None, 0).tolist() == [1, 2]
    # Chunks of eight: only the chunk's first four tokens need to be there.
    assert starts_of(12, 8, None, 0).tolist() == [1]


@pytest.mark.parametrize(("length", "most"), [(21, 5), (27, 7), (16, 11)])
def test_every_start_is_picked_as_often(length, most):
    """5000 seeds: each of the starts within five standard errors; a wrong alarm is below 1e-4."""
    count = length - 4
    times = np.zeros(count)
    for seed in range(5000):
        picked = starts_of(length, 1, most, seed)
        assert len(set(picked.tolist())) == most and np.all(np.diff(picked) > 0)
        assert np.max(np.diff(picked)) <= -(-count // most)
        times[picked - 1] += 1
    share = most / count
    assert np.all(np.abs(times / 5000 - share) < 5 * np.sqrt(share * (1 - share) / 5000))


def test_batches_cover_the_documents_once():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 99, n) for n in (3, 70, 12, 5, 200, 66, 9)]
    starts = [starts_of(len(d), 2, 6, i) for i, d in enumerate(documents)]
    batches = list(batches_of(documents, starts, 7, size=2, batch_size=3, ways=2))
    seen = [i for b in batches for i in b.rows if i >= 0]
    assert sorted(seen) == [1, 2, 4, 5, 6], "a document without starts is left out"
    for batch in batches:
        assert batch.tokens.shape[0] == 4 and batch.tokens.shape[1] % 2 == 0
        steps = np.diff(batch.starts, axis=1, prepend=1)
        assert np.all(steps >= 0) and np.all(steps <= batch.gap)
        for row, i in enumerate(batch.rows):
            if i < 0:
                assert batch.picked[row] == 0
                continue
            own = documents[i]
            assert batch.tokens[row, : len(own)].tolist() == own.tolist()
            assert batch.starts[row, : batch.picked[row]].tolist() == starts[i].tolist()
            assert batch.seeds[row] == 7 + i and batch.lengths[row] == len(own)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "documents is empty"),
        (["text"], r"documents\[0\] is a text"),
        ([3], r"documents\[0\] is a int"),
        ([{"ids": [[1]]}], "no 'tokens'"),
        ([{"tokens": [[1, 2]], "segment_ids": [[1]]}], r"segment_ids \(1, 1\)"),
    ],
)
def test_what_is_no_document_is_named(documents, message):
    with pytest.raises(InputError, match=message):
        documents_of(None, documents)
    with pytest.raises(InputError, match="max_length=4"):
        documents_of(None, [[1, 2]], max_length=4)
