"""What samples are worth, against processes and counts whose answer is known."""

import itertools

import numpy as np
import pytest

from jaxalope import InputError
from jaxalope.infer.diagnostics import effective_sample_size, pass_at_k


def autoregression(phi, steps, chains, seed=0):
    """A stationary AR(1): autocorrelations ``phi ** lag``, so ``tau = (1 + phi) / (1 - phi)``."""
    rng = np.random.default_rng(seed)
    x = np.empty((steps, chains))
    x[0] = rng.normal(size=chains)
    noise = np.sqrt(1 - phi**2) * rng.normal(size=(steps, chains))
    for t in range(1, steps):
        x[t] = phi * x[t - 1] + noise[t]
    return x


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("chains", [1, 4])
def test_autoregression(phi, chains):
    """Over 60 seeds the ratio to the known value spreads by .014, .028 and .071 (one deviation)."""
    steps = 40_000 // chains
    expected = steps * chains * (1 - phi) / (1 + phi)
    found = effective_sample_size(autoregression(phi, steps, chains))
    assert found == pytest.approx(expected, rel=0.1 + 0.25 * phi)


def test_it_does_not_depend_on_units():
    x = autoregression(0.7, 500, 3)
    assert effective_sample_size(5 - 3 * x) == pytest.approx(effective_sample_size(x))


def test_chains_stuck_apart_are_one_draw_each():
    apart = autoregression(0.0, 200, 8) * 0.01 + np.arange(8.0)
    assert 8 <= effective_sample_size(apart) < 9
    together = effective_sample_size(apart - np.arange(8.0))
    assert together > 1000


def test_swings_are_not_counted_twice():
    x = autoregression(-0.8, 1000, 2)
    assert effective_sample_size(x) == 2000


@pytest.mark.parametrize("shape", [(1, 5), (10, 5), (10, 1)])
def test_nothing_moved(shape):
    assert effective_sample_size(np.full(shape, 0.1)) == shape[1]
    assert effective_sample_size(np.zeros(shape) + np.arange(shape[1]) / 3) == shape[1]


@pytest.mark.parametrize("trace", [np.zeros(3), np.zeros((0, 3)), np.full((3, 1), np.nan)])
def test_bad_traces_are_named(trace):
    with pytest.raises(InputError, match="trace"):
        effective_sample_size(trace)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_average_over_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        correct = np.arange(n) < c
        subsets = [correct[list(s)].any() for s in itertools.combinations(range(n), k)]
        assert pass_at_k(n, c, k) == pytest.approx(np.mean(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(10_000, 10_000, 1) == 1.0


@pytest.mark.parametrize(
    ("n", "c", "k", "words"), [(4, 5, 1, "c=5"), (4, 2, 5, "k=5"), (4, 2, 0, "k=0")]
)
def test_bad_counts_are_named(n, c, k, words):
    with pytest.raises(InputError, match=words):
        pass_at_k(n, c, k)
