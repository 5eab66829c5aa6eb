"""Look-ahead against the enumerable toy: the law of its choices, with known and estimated zeta.

Statistical bounds lie at least four standard deviations (over seeds) from what is expected, so that
a change of seed fails one of them with a chance below 1e-4.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import toys

import jaxalope
from jaxalope import InputError, Temperature
from jaxalope.infer.lookahead import Lookahead, choice_law, sample_lookahead
from jaxalope.infer.programs import program_of
from jaxalope.infer.request import make_batch

pytestmark = pytest.mark.long

GOLDEN = toys.golden()
SEQUENCES = [tuple(s) for s in GOLDEN["sequences"]]
RUNS = 6000
PROMPTS = ["def f(x):", "i"]
MANY_BLOCKS = {"block": 2, "pool": 24, "num_candidates": 24, "num_rollouts": 4, "n": 2000}


@pytest.fixture(scope="module")
def toy():
    return toys.golden_model()


@pytest.fixture(scope="module")
def hybrid():
    """Recurrent and attention layers; larger weights, so that distributions are not flat."""
    return toys.hybrid_model()


def requests(model, count=1, new=4, seed=0):
    """Prompts of one token each, on a canvas no wider than need be."""
    batch = make_batch(model, [[0]] * count, None, new, seed, [3])
    return dataclasses.replace(batch, prompts=batch.prompts[:, :1], capacity=8)


def sample(model, alpha, batch=None, **settings):
    batch = requests(model) if batch is None else batch
    settings = {"num_candidates": 4, **settings}
    return sample_lookahead(model, batch, alpha=alpha, t_max=4, **settings)


def case(alpha):
    return GOLDEN["cases"][str(float(alpha))]


def distance(found, law) -> float:
    return toys.total_variation(toys.frequencies(found.tokens, GOLDEN), law)


def tokens_of(samples):
    return [t.tolist() for t in samples.tokens]


@functools.cache
def log_zeta(prefix, alpha):
    """Of everything that can follow, by summing over it."""
    mass = sum(
        np.exp(alpha * log_p)
        for s, log_p in zip(SEQUENCES, GOLDEN["log_p"], strict=True)
        if s[: len(prefix)] == prefix
    )
    return np.log(mass) - alpha * log_p_of(prefix)


@functools.cache
def log_p_of(prefix):
    total = 0.0
    for i, token in enumerate(prefix):
        logits = np.array(GOLDEN["prefix_logits"][",".join(map(str, prefix[:i]))])
        total += logits[token] - np.log(np.exp(logits).sum())
    return total


@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_known_zeta_gives_the_target(alpha):
    found = {}
    for prefix in {s[:i] for s in SEQUENCES for i in range(len(s))}:
        step = np.array([log_p_of((*prefix, c)) - log_p_of(prefix) for c in range(4)])
        zeta = np.array([log_zeta((*prefix, c), alpha) for c in range(4)])
        law = choice_law(step[None].astype(np.float32), zeta[None, :, None], alpha)
        found |= {(*prefix, c): float(law[0, c]) for c in range(4)}
    law = [sum(found[s[: i + 1]] for i in range(len(s))) for s in SEQUENCES]
    np.testing.assert_allclose(np.exp(law), case(alpha)["target"], atol=1e-6)


class Knowing(Lookahead):
    """Knows zeta of the toy, instead of estimating it."""

    def _futures(self, model, layout, state, candidates, stops, alpha, horizon):
        table = np.zeros((5, 4**4), np.float32)
        for prefix in {s[: i + 1] for s in SEQUENCES for i in range(len(s))}:
            table[len(prefix), np.polyval(prefix, 4)] = log_zeta(prefix, 2.0)
        tokens, length = candidates.state.tokens[:, 1:5], candidates.state.length - 1
        code = jnp.zeros_like(length)
        for i in range(4):
            code = jnp.where(i < length, 4 * code + tokens[:, i], code)
        shape = (*candidates.log_p.shape, 1)
        return jnp.asarray(table)[length, code].reshape(shape), candidates.decoded * 0


def test_choices_follow_the_law(toy, monkeypatch):
    monkeypatch.setattr("jaxalope.infer.lookahead.Lookahead", Knowing)
    found = sample(toy, 2, num_rollouts=1, n=RUNS)
    # Of this many independent draws, .016 +- .004.
    assert distance(found, case(2)["target"]) < 0.033


# Total variation to p ** alpha of 6000 draws, mean and standard deviation over 200 simulations.
@pytest.mark.parametrize(
    ("alpha", "rollouts", "jackknife", "mean", "deviation"),
    [
        (2, 2, False, 0.0386, 0.0056),
        (2, 2, True, 0.0237, 0.0046),
        (2, 8, False, 0.0176, 0.0044),
        (2, 8, True, 0.0165, 0.0037),
        (4, 2, False, 0.1226, 0.0059),
        (4, 2, True, 0.0378, 0.0044),
        (4, 8, False, 0.0134, 0.0041),
        (4, 8, True, 0.0079, 0.0030),
    ],
)
def test_law_of_estimates(toy, alpha, rollouts, jackknife, mean, deviation):
    found = sample(toy, alpha, num_rollouts=rollouts, jackknife=jackknife, n=RUNS)
    assert abs(distance(found, case(alpha)["target"]) - mean) < 4.5 * deviation


def test_jackknife():
    golden = GOLDEN["jackknife"]
    log_p = np.array(golden["log_p"], np.float32)
    futures = (golden["alpha"] - 1) * np.array(golden["rollout_logp"], np.float32)
    for jackknife, name in ((False, "plain"), (True, "clipped_renormalised")):
        law = choice_law(log_p[None], futures[None], golden["alpha"], jackknife)
        np.testing.assert_allclose(np.exp(law[0]), golden[name], atol=2e-6)


def test_extreme_probabilities_give_no_nan():
    log_p = np.array([[0.0, -50.0, -np.inf], [-9e3, -9.1e3, -np.inf]], np.float32)
    futures = np.array([[-1e4, -3e4], [-2e4, -1e4], [0.0, 0.0]], np.float32)
    for alpha in (1.0, 4.0, 64.0):
        law = choice_law(log_p, np.stack([futures, -futures]), alpha)
        assert not np.isnan(law).any()
        np.testing.assert_allclose(np.exp(law).sum(1), 1, rtol=1e-5)
        assert (law[:, 2] == -np.inf).all()


def test_jackknife_sets_negative_probabilities_to_zero():
    """One roll-out of the unlikely candidate is worth a thousand of the others."""
    futures = np.zeros((1, 2, 4), np.float32)
    futures[0, 1, 0] = 7
    law = np.exp(choice_law(np.log([[0.5, 0.5]]).astype(np.float32), futures, 2.0))[0]
    plain = np.exp(choice_law(np.log([[0.5, 0.5]]).astype(np.float32), futures, 2.0, False))[0]
    zeta = np.exp(futures[0])
    without = np.array([(zeta.sum(1) - zeta[:, s]) / 3 for s in range(4)])
    by_hand = 4 * plain - 3 * (without / without.sum(1, keepdims=True)).mean(0)
    assert by_hand[0] < 0
    np.testing.assert_allclose(law, [0, 1], atol=1e-6)


def test_alpha_one_is_plain_sampling(toy):
    found = sample(toy, 1, num_rollouts=2, n=RUNS)
    plain = jaxalope.generate(toy, [[0]], Temperature(1.0), 4, 0, n=RUNS, stop_tokens=[3])
    assert tokens_of(found) == tokens_of(plain)
    assert found.finish_reasons == plain.finish_reasons


def test_hybrid_without_horizon_is_temperature(hybrid):
    """Recurrent state goes with the candidate that is chosen."""
    batch = make_batch(hybrid, PROMPTS, None, 6, 3, ())
    settings = {"num_candidates": hybrid.config.vocab_size, "num_rollouts": 1, "horizon": 0}
    found = sample_lookahead(hybrid, batch, alpha=2.0, t_max=6, n=2, **settings)
    cold = jaxalope.generate(hybrid, PROMPTS, Temperature(0.5), 6, 3, n=2, stop_tokens=())
    assert found.text == cold.text
    np.testing.assert_allclose(found.logprob, [x.sum() for x in cold.logprobs], rtol=1e-5)
    assert found.tokens_decoded == 2 * 2 * 6


@pytest.mark.parametrize("block", [1, 2])
def test_sharded_equals_one_device(toy, block):
    one, many = (
        sample(model, 2, requests(model, 3), num_candidates=3, num_rollouts=2, block=block, n=2)
        for model in (toy, toys.sharded(toy))
    )
    assert tokens_of(one) == tokens_of(many)
    assert one.tokens_decoded == many.tokens_decoded
    np.testing.assert_allclose(one.logprob, many.logprob, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"num_rollouts": 2, "n": RUNS}, MANY_BLOCKS])
def test_recurrent_equals_addressed_by_position(toy, settings):
    recurrent = toys.golden_model(recurrent=True)
    a, b = sample(toy, 2, **settings), sample(recurrent, 2, **settings)
    assert tokens_of(a) == tokens_of(b)
    np.testing.assert_array_equal(a.logprob, b.logprob)
    assert a.tokens_decoded == b.tokens_decoded


def test_alone_or_among_others(toy):
    new, seeds = [2, 4, 3, 1], [5, 6, 7, 8]
    settings = {"num_rollouts": 2, "n": 3, "block": 3}
    together = sample(toy, 4, requests(toy, 4, new, seeds), **settings)
    for i in range(4):
        alone = sample(toy, 4, requests(toy, 1, new[i], seeds[i]), **settings)
        assert tokens_of(together)[3 * i : 3 * i + 3] == tokens_of(alone)


def test_logprob_is_of_the_response(toy):
    found = sample(toy, 2, num_rollouts=2, n=RUNS)
    expected = [log_p_of(tuple(t.tolist())) for t in found.tokens]
    np.testing.assert_allclose(found.logprob, expected, atol=1e-5)


def test_horizon(toy):
    """Beyond the end nothing changes; without one this is low temperature."""
    settings = {"num_rollouts": 2}
    free = sample(toy, 2, n=RUNS, **settings)
    assert tokens_of(free) == tokens_of(sample(toy, 2, horizon=3, n=RUNS, **settings))
    short = sample(toy, 2, horizon=1, n=RUNS, **settings)
    assert short.tokens_decoded < free.tokens_decoded
    none = sample(toy, 2, horizon=0, n=RUNS, **settings)
    assert distance(none, case(2)["lowtemp"]) < 0.033
    assert none.tokens_decoded == sum(map(len, none.tokens))


def test_few_candidates_are_the_likeliest(toy):
    greedy = sample(toy, 2, num_candidates=1, num_rollouts=1, n=3)
    best = jaxalope.generate(toy, [[0]], jaxalope.Greedy(), 4, stop_tokens=[3])
    assert tokens_of(greedy) == tokens_of(best) * 3


@pytest.mark.parametrize(("pool", "kept"), [(8, 8), (16, 4)])
def test_blocks(toy, pool, kept):
    """Whole responses as blocks: drawn from p, each once, the likeliest kept, then p ** alpha."""
    found = sample(toy, 2, block=5, pool=pool, num_candidates=kept, num_rollouts=2, n=RUNS)
    rng, log_p = np.random.default_rng(0), np.array(GOLDEN["log_p"])
    law = np.zeros(len(log_p))
    trials = 20_000
    for drawn in rng.choice(len(log_p), (trials, pool), p=np.exp(log_p)):
        drawn = np.unique(drawn)
        drawn = drawn[np.argsort(-log_p[drawn])][:kept]
        weight = np.exp(2 * log_p[drawn])
        law[drawn] += weight / weight.sum() / trials
    assert distance(found, law) < 0.045
    assert found.tokens_decoded > 3 * pool * RUNS


def test_blocks_of_many_candidates_approach_the_target(toy):
    found = sample(toy, 2, **MANY_BLOCKS)
    assert distance(found, case(2)["target"]) < 0.1


def test_one_compilation_for_all_numbers(toy):
    toy = dataclasses.replace(toy)  # Another handle has compiled nothing yet.
    for alpha, horizon in ((2.0, None), (4.0, 1), (1.5, 2)):
        sample(toy, alpha, num_rollouts=2, horizon=horizon)
    assert program_of(toy, Lookahead, 4, 2, 1, 16, True).run._cache_size() == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -1.0}, "alpha=-1"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"num_rollouts": 0}, "num_rollouts=0"),
        ({"block": 0}, "block=0"),
        ({"horizon": -1}, "horizon=-1"),
        ({"block": 2, "pool": 3}, "pool=3"),
        ({"n": 0}, "n=0"),
    ],
)
def test_bad_settings_are_named(toy, settings, words):
    with pytest.raises(InputError, match=words):
        sample(toy, **{"alpha": 2.0, **settings})
