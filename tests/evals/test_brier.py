"""The arithmetic of BrierLM against explicit laws and plain loops."""

import json
import math

import numpy as np
import pytest

from jaxalope import InputError
from jaxalope.evals import BrierLM
from jaxalope.evals.brier import exact_terms, matches, sampled_terms


def brier(law, truth):
    """``2 P(y) - sum P²`` of the first 1 to 4 tokens, of a joint law ``[V, V, V, V]``."""
    found = []
    for n in range(1, 5):
        marginal = law.sum(axis=tuple(range(n, 4)))
        found.append(2 * marginal[tuple(truth[:n])] - np.sum(marginal**2))
    return np.array(found)


def test_two_draws_are_unbiased_on_an_explicit_law():
    """Within five standard errors for three truths and four n: a wrong alarm is below 1e-5."""
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.full(81, 0.3)).reshape(3, 3, 3, 3)
    draws = rng.choice(81, size=(2, 40_000), p=law.ravel())
    first, second = np.stack(np.unravel_index(draws, law.shape), axis=-1)
    likeliest = np.unravel_index(law.argmax(), law.shape)
    for truth in (likeliest, (0, 1, 2, 0), (2, 2, 2, 1)):
        terms = np.asarray(sampled_terms(first, second, np.array(truth)), np.float64)
        assert set(np.unique(terms)) <= {-1.0, 0.0, 1.0, 2.0}
        error = terms.std(axis=0) / math.sqrt(len(terms))
        assert np.all(np.abs(terms.mean(axis=0) - brier(law, truth)) < 5 * error + 1e-9)


def test_terms_are_the_loops():
    rng = np.random.default_rng(1)
    first, second, truth = rng.integers(0, 2, (3, 200, 4))
    gold, squares = rng.random((2, 200, 4))
    sampled = np.asarray(sampled_terms(first, second, truth))
    exact = np.asarray(exact_terms(gold, first, second, squares))
    for i in range(200):
        for n in range(1, 5):
            x1, x2, y = (list(x[i, :n]) for x in (first, second, truth))
            assert sampled[i, n - 1] == (x1 == y) + (x2 == y) - (x1 == x2)
            agree = list(first[i, : n - 1]) == list(second[i, : n - 1])
            want = 2 * np.prod(gold[i, :n]) - agree * squares[i, n - 1]
            assert exact[i, n - 1] == pytest.approx(want, abs=1e-6)
    assert np.asarray(matches(first, first)).all()


def test_the_mean_counts_positions_and_its_error_documents():
    rng = np.random.default_rng(2)
    weights = np.array([5, 0, 11, 2, 40])
    positions = [rng.normal(0.3, 0.1, (n, 4)) + rng.normal(0, 0.1) for n in weights]
    found = BrierLM.of([p.sum(axis=0) for p in positions], weights)
    every = np.concatenate(positions)
    np.testing.assert_allclose(found.factors, every.mean(axis=0))
    assert found.score == pytest.approx(100 * np.prod(every.mean(axis=0)) ** 0.25)
    assert (found.positions, found.documents, found.not_positive) == (58, 4, ())
    moves = [(p - found.factors).sum(axis=0) / 58 for p in positions if len(p)]
    want = np.sqrt(4 / 3 * np.sum(np.square(moves), axis=0))
    np.testing.assert_allclose(found.standard_errors, want)
    # The score's error by a finite difference in each document's share of the factors.
    up = [100 * np.prod(found.factors + 1e-5 * m) ** 0.25 - found.score for m in moves]
    assert found.score_error == pytest.approx(np.sqrt(4 / 3 * np.sum(np.square(up))) / 1e-5, 1e-3)


def test_standard_errors_cover_the_truth():
    """Of 2000 samples of 30 documents, 92 to 97% lie within 1.96 errors: nominal is 95%.

    A right error covers 94.4% here (Student's t); 2.4% less or more is four standard deviations.
    """
    rng = np.random.default_rng(3)
    inside, scores = [], []
    truth = np.array([0.5, 0.4, 0.3, 0.2])
    for _ in range(2000):
        weights = rng.integers(5, 15, 30)
        sums = weights[:, None] * (truth + rng.normal(0, 0.05, (30, 4)))
        found = BrierLM.of(sums, weights)
        inside.append(np.abs(found.factors - truth) < 1.96 * found.standard_errors)
        scores.append(abs(found.score - 100 * np.prod(truth) ** 0.25) < 1.96 * found.score_error)
    assert 0.92 < np.mean(inside) < 0.97 and 0.92 < np.mean(scores) < 0.97


@pytest.mark.parametrize(
    ("factors", "bad"),
    [
        ([-0.8, -0.8, -0.8, -0.8], (1, 2, 3, 4)),
        ([0.5, -0.1, 0.2, -0.1], (2, 4)),
        ([0.5, 0.1, 0.1, 0.0], (4,)),
    ],
)
def test_factors_that_are_not_positive_are_flagged_and_score_nothing(factors, bad):
    found = BrierLM.of([np.array(factors) * 3, np.array(factors) * 5], [3, 5])
    assert found.score == 0 and found.not_positive == bad and math.isnan(found.score_error)
    np.testing.assert_allclose(found.factors, factors)
    assert "no score" in str(found) and f"Brier-{bad[0]}" in str(found)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["score"] == 0 and values["score_error"] is None
    assert values["not_positive"] == list(bad) and values["positions"] == 8


def test_one_document_has_no_error_and_none_no_score():
    found = BrierLM.of([[1.0, 1, 1, 1]], [2])
    assert found.score == pytest.approx(50) and np.all(np.isnan(found.standard_errors))
    with pytest.raises(InputError, match="no position"):
        BrierLM.of(np.zeros((2, 4)), [0, 0])
