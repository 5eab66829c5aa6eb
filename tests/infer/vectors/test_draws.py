"""Likelihood-free temperature against its laws, on a source whose probabilities are known.

Statistical tests ask whether a right sampler would be as far off once in a million times; seeds are
fixed, so that they give the same answer every time.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxalope import BatchTemperature, ExactTemperature, InputError, Temperature, TopP
from jaxalope.infer.vectors import draw_chunks
from jaxalope.infer.vectors.temperature import chunk_policies, exponent

pytestmark = pytest.mark.long

FALSE_ALARM = 1e-6
# Six chunks of two tokens: (0, 0), (0, 1), (0, 2), (1, 0), ...
P = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
CHUNKS = np.array([(x // 3, x % 3) for x in range(6)], np.int32)


@jax.jit
def _draw(rows, p, keys, *args):
    def source(keys):
        draw = jax.vmap(jax.vmap(lambda key: jax.random.categorical(key, jnp.log(p))))
        return jnp.asarray(CHUNKS)[draw(keys)]

    return draw_chunks(rows, source, keys, *args)


def draw(policies, p=P, given=(0, 0), fixed=(False, False), seeds=None):
    """What rows of these policies draw, row ``i`` with seed ``i``."""
    count = len(policies)
    seeds = np.arange(count) if seeds is None else np.asarray(seeds)
    rows = jax.tree.map(jnp.asarray, type(policies[0]).stack(policies))
    keys = jax.vmap(jax.random.key)(seeds)
    args = (
        jnp.broadcast_to(jnp.asarray(given, jnp.int32), (count, 2)),
        jnp.broadcast_to(jnp.asarray(fixed), (count, 2)),
        jnp.ones(count, bool),
    )
    return jax.device_get(_draw(rows, jnp.asarray(p), keys, *args))


def index(chunks):
    return chunks[..., 0] * 3 + chunks[..., 1]


def assert_law(found, law):
    """Pearson's test; chunks that should come fewer than 5 times count as one."""
    seen = np.bincount(found, minlength=len(law)).astype(float)
    hoped = len(found) * np.asarray(law)
    assert not seen[hoped == 0].any()
    rare = hoped < 5
    seen, hoped = (np.append(x[~rare], x[rare].sum()) for x in (seen, hoped))
    seen, hoped = seen[hoped > 0], hoped[hoped > 0]
    statistic = np.sum((seen - hoped) ** 2 / hoped)
    assert statistic < stats.chi2.isf(FALSE_ALARM, len(seen) - 1), (seen, hoped)


def assert_mean(found, mean):
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    z = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(np.mean(found) - mean) <= z * error + 1e-9, (np.mean(found), mean)


def tempered(p, temperature):
    q = p ** (1 / temperature)
    return q / q.sum()


def expected_draws(p, temperature, stop_early=False):
    whole, part = exponent(temperature)
    agreement = float(whole)
    if stop_early:
        # Draw k + 1 is made if the first k are equal; the first two always are made.
        agreement = 1 + sum(np.sum(p**k) if k > 1 else 1.0 for k in range(1, whole))
    factory = np.sum(p ** (1 / temperature - 1)) if part else 0.0
    return (agreement + factory) / np.sum(p ** (1 / temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5, 1 / 3, 0.3])
@pytest.mark.parametrize("stop_early", [False, True], ids=["published", "early"])
def test_the_exact_law_and_number_of_draws(temperature, stop_early):
    drawn = draw([ExactTemperature(temperature, 100_000, stop_early)] * 10_000)
    assert not drawn.exhausted.any()
    assert_law(index(drawn.chunk), tempered(P, temperature))
    assert_mean(drawn.draws, expected_draws(P, temperature, stop_early))


def test_the_law_test_can_fail():
    drawn = draw([ExactTemperature(0.5)] * 10_000)
    with pytest.raises(AssertionError):
        assert_law(index(drawn.chunk), tempered(P, 0.55))
    with pytest.raises(AssertionError):
        assert_mean(drawn.draws, expected_draws(P, 0.55))


def test_the_exact_law_where_a_chunk_must_begin_so():
    """Draws that begin otherwise are dropped: the law is the conditional one, tempered."""
    drawn = draw([ExactTemperature(0.4, 100_000)] * 10_000, given=(0, 7), fixed=(True, False))
    conditional = np.append(P[:3] / P[:3].sum(), np.zeros(3))
    assert_law(index(drawn.chunk), tempered(conditional, 0.4))
    assert_mean(drawn.draws, expected_draws(conditional[:3], 0.4) / P[:3].sum())


def finite_law(p, num_draws, whole):
    """The published rule's law over all of the sequences of draws, one by one."""
    law = np.zeros(len(p))
    for sequence in itertools.product(range(len(p)), repeat=num_draws):
        counts = np.bincount(sequence, minlength=len(p))
        level = next(m for m in range(whole, 0, -1) if (counts >= m).any())
        weights = np.array([math.comb(c, level) for c in counts], float)
        law += np.prod(p[list(sequence)]) * weights / weights.sum()
    return law


@pytest.mark.parametrize(("num_draws", "whole"), [(4, 2), (3, 3), (5, 3), (2, 3), (5, 1)])
def test_the_finite_law_of_the_batch_rule(num_draws, whole):
    p = np.array([0.55, 0.3, 0.15])
    law = finite_law(p, num_draws, whole)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)
    # Far enough from the target that the test tells them apart.
    assert whole == 1 or np.abs(law - tempered(p, 1 / whole)).sum() > 0.02
    drawn = draw([BatchTemperature(1 / whole, num_draws)] * 40_000, p)
    assert_law(index(drawn.chunk), law)
    assert (drawn.draws == (1 if whole == 1 else num_draws)).all()


def test_the_batch_rule_where_a_chunk_must_begin_so():
    policy = BatchTemperature(0.5, 3)
    drawn = draw([policy] * 40_000, given=(0, 0), fixed=(True, False))
    conditional = P[:3] / P[:3].sum()
    assert_law(index(drawn.chunk), np.append(finite_law(conditional, 3, 2), np.zeros(3)))
    assert_mean(drawn.draws, 3 / P[:3].sum())


def test_many_draws_come_near_the_target():
    drawn = draw([BatchTemperature(0.5, 200, draws_per_call=200)] * 2000)
    found = np.bincount(index(drawn.chunk), minlength=6) / 2000
    # The standard error of each frequency is below 0.0112: five of them, and the rule's bias.
    np.testing.assert_allclose(found, tempered(P, 0.5), atol=0.06)


@pytest.mark.parametrize(
    "policies",
    [
        [ExactTemperature(t, 30) for t in (1.0, 0.5, 0.3, 0.21, 0.7)] * 4,
        [BatchTemperature(t, n) for t, n in ((1.0, 5), (0.5, 9), (1 / 3, 20), (0.25, 4))] * 4,
    ],
    ids=["exact", "batch"],
)
def test_a_row_alone_draws_the_same(policies):
    """Whatever its neighbours need, and however many draws a call makes."""
    together = draw(policies)
    for i in range(0, len(policies), 7):
        alone = draw([policies[i]], seeds=[i])
        for name in ("chunk", "draws", "exhausted"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[i])
    other = draw([dataclasses.replace(p, draws_per_call=7) for p in policies])
    jax.tree.map(np.testing.assert_array_equal, other, together)


def test_a_budget_that_is_used_up_is_flagged():
    flat = np.full(6, 1 / 6)
    policies = [ExactTemperature(0.05, 40), ExactTemperature(1.0), ExactTemperature(0.05, 25)]
    drawn = draw(policies, flat)
    np.testing.assert_array_equal(drawn.exhausted, [True, False, True])
    np.testing.assert_array_equal(drawn.draws, [40, 1, 25])
    # A beginning that never comes is there all the same.
    never = draw([ExactTemperature(1.0, 40)] * 2, P, given=(5, 0), fixed=(True, False))
    assert never.exhausted.all() and (never.draws == 40).all()
    assert (never.chunk[:, 0] == 5).all() and (never.chunk[:, 1] < 3).all()
    never = draw([BatchTemperature(0.5, 4, 40)] * 2, P, given=(5, 0), fixed=(True, False))
    assert never.exhausted.all() and (never.chunk[:, 0] == 5).all()


@pytest.mark.parametrize("whole", [1, 2, 3, 7, 10, 49, 93, 300])
def test_rounding_makes_no_fraction(whole):
    assert exponent(1 / whole) == (whole, 0.0)
    assert exponent(np.float64(1) / whole) == (whole, 0.0)


def test_a_fraction_is_one():
    assert exponent(0.7) == (1, pytest.approx(1 / 0.7 - 1))
    assert exponent(0.333) == (3, pytest.approx(1 / 0.333 - 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ExactTemperature(1.5), ["temperature=1.5", "flatten"]),
        (lambda: ExactTemperature(0.0), ["temperature=0.0", "BatchTemperature"]),
        (lambda: ExactTemperature(float("nan")), ["temperature=nan"]),
        (lambda: ExactTemperature("0.5"), ["temperature='0.5'"]),
        (lambda: ExactTemperature(0.1, max_draws=9), ["max_draws=9", "10"]),
        (lambda: ExactTemperature(0.5, draws_per_call=0), ["draws_per_call=0"]),
        (lambda: BatchTemperature(0.7), ["temperature=0.7", "1.42857", "ExactTemperature(0.7)"]),
        (lambda: BatchTemperature(0.333), ["temperature=0.333", "1/3 or 1/4"]),
        (lambda: BatchTemperature(0.5, num_draws=0), ["num_draws=0"]),
        (lambda: BatchTemperature(0.5, num_draws=2.5), ["num_draws=2.5", "whole number"]),
        (lambda: ExactTemperature(0.5, max_draws=None), ["max_draws=None", "whole number"]),
        (lambda: BatchTemperature(0.5, 300, max_draws=200), ["max_draws=200", "300"]),
        (lambda: chunk_policies(TopP(0.9), 1), ["TopP", "ExactTemperature(T)"]),
        (lambda: chunk_policies([Temperature(0.5)] * 2, 3), ["2 entries for 3 prompts"]),
        (
            lambda: chunk_policies([ExactTemperature(0.5), BatchTemperature(0.5)], 2),
            ["ExactTemperature for some", "generate twice"],
        ),
        (
            lambda: draw([ExactTemperature(0.5), ExactTemperature(0.5, stop_early=True)]),
            ["differ in stop_early"],
        ),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(InputError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_policies_of_one_kind():
    assert chunk_policies(Temperature(0.5), 2) == [ExactTemperature(0.5)] * 2
    mixed = chunk_policies([Temperature(1.0), BatchTemperature(0.5, 20)], 2)
    assert mixed == [BatchTemperature(1.0), BatchTemperature(0.5, 20)]
