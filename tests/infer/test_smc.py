"""Particles against the enumerable toy: the law of what they choose, evidence, keys, meshes.

Statistical bounds lie at least four standard deviations (over seeds) from what is expected, so that
a change of seed fails one of them with a chance below 1e-4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import jaxalope
from jaxalope import InputError, Temperature
from jaxalope.infer.cache import CacheLayout
from jaxalope.infer.driver import decoder_of
from jaxalope.infer.request import make_batch
from jaxalope.infer.smc import (
    ParticleFilter,
    Particles,
    Schedule,
    effective_sample_size,
    exponents_of,
    sample_smc,
    systematic,
)

pytestmark = pytest.mark.long

GOLDEN = toys.golden()
RUNS = 4000
PROMPTS = ["def f(x):", "i"]


@pytest.fixture(scope="module")
def toy():
    return toys.golden_model()


@pytest.fixture(scope="module")
def hybrid():
    """Recurrent and attention layers; larger weights, so that distributions are not flat."""
    return toys.hybrid_model()


def requests(model, count=1, new=4, seed=0, width=8):
    """Prompts of one token each, on a canvas no wider than need be."""
    batch = make_batch(model, [[0]] * count, None, new, seed, [3])
    return dataclasses.replace(batch, prompts=batch.prompts[:, :1], capacity=width)


def sample(model, alpha, batch=None, **settings):
    batch = requests(model) if batch is None else batch
    return sample_smc(model, batch, alpha=alpha, t_max=4, **settings)


def case(alpha):
    return GOLDEN["cases"][str(float(alpha))]


def distance(found, law) -> float:
    return toys.total_variation(toys.frequencies(found.tokens, GOLDEN), law)


def evidence_error(found, exact) -> float:
    """In standard errors."""
    evidence = np.exp(found.log_evidence.astype(np.float64))
    return (evidence.mean() - exact) / (evidence.std() / np.sqrt(evidence.size))


def tokens_of(samples):
    return [t.tolist() for t in samples.tokens]


def equal(a, b):
    for name in ("logprob", "effective_sample_size", "log_evidence"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.tokens_decoded == b.tokens_decoded
    assert tokens_of(a) == tokens_of(b)


# Total variation to p ** alpha of 4000 draws. Where nothing is resampled it is known (over 100
# simulations .042 +- .007 and .047 +- .004 with 8 particles, .022 +- .005 with 32), and resampling
# every token adds at most .006; one particle is .147 +- .007 and .104 +- .003, low temperature.
@pytest.mark.parametrize(
    ("alpha", "particles", "least", "most"),
    [(2, 8, 0.018, 0.075), (4, 8, 0.025, 0.07), (2, 32, 0, 0.045), (4, 32, 0, 0.045)],
)
@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_law(toy, alpha, particles, least, most, threshold):
    found = sample(toy, alpha, num_particles=particles, resample_threshold=threshold, n=RUNS)
    assert least < distance(found, case(alpha)["target"]) < most
    assert abs(evidence_error(found, case(alpha)["normaliser_sum_p_alpha"])) < 4
    assert found.logprob.shape == found.log_evidence.shape == (RUNS,)
    # The last weights are what is drawn by: no resampling makes them even.
    assert np.mean(found.effective_sample_size < particles - 0.01) > 0.2


@pytest.mark.parametrize("alpha", [2, 4])
def test_one_particle_is_low_temperature(toy, alpha):
    """The very tokens that a sample of the same number and seed has."""
    found = sample(toy, alpha, num_particles=1, n=RUNS)
    assert distance(found, case(alpha)["lowtemp"]) < 0.045
    assert distance(found, case(alpha)["target"]) > 0.085
    cold = Temperature(1 / alpha)
    plain = jaxalope.generate(toy, [[0]], cold, 4, n=RUNS, stop_tokens=[3])
    assert tokens_of(found) == tokens_of(plain)
    np.testing.assert_allclose(found.logprob, [x.sum() for x in plain.logprobs], rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"ladder": [0.0, 1.5]}, {"ladder": 9}, {"tau": 0.8}, {"resample_every": 2}],
    ids=str,
)
def test_no_setting_changes_the_target(toy, settings):
    found = sample(toy, 2, num_particles=32, resample_threshold=2.0, n=RUNS, **settings)
    assert distance(found, case(2)["target"]) < 0.055
    assert abs(evidence_error(found, case(2)["normaliser_sum_p_alpha"])) < 4


def test_alpha_one_is_plain_sampling(toy):
    found = sample(toy, 1, num_particles=8, resample_threshold=2.0, n=RUNS)
    np.testing.assert_allclose(found.effective_sample_size, 8, rtol=1e-6)
    np.testing.assert_allclose(found.log_evidence, 0, atol=1e-6)
    assert distance(found, np.exp(GOLDEN["log_p"])) < 0.075


def test_recurrent_equals_addressed_by_position(toy):
    recurrent = toys.golden_model(recurrent=True)
    settings = {"num_particles": 8, "resample_threshold": 2.0, "n": RUNS}
    equal(sample(toy, 2, **settings), sample(recurrent, 2, **settings))


def test_logprob_is_of_the_response(toy):
    found = sample(toy, 2, num_particles=8, resample_threshold=2.0, n=RUNS)
    index = {tuple(s): i for i, s in enumerate(GOLDEN["sequences"])}
    expected = [GOLDEN["log_p"][index[tuple(t.tolist())]] for t in found.tokens]
    np.testing.assert_allclose(found.logprob, expected, atol=1e-5)
    ends = ["stop" if t[-1] == GOLDEN["EOS"] else "length" for t in found.tokens]
    assert found.finish_reasons == ends


def test_alone_or_among_others(toy):
    """Short responses must not go on climbing the ladder while others still grow."""
    settings = {"num_particles": 8, "resample_threshold": 0.9, "ladder": 7}
    new, seeds = [2, 4, 3, 1], [5, 6, 7, 8]
    together = sample(toy, 4, requests(toy, 4, new, seeds), n=3, **settings)
    for i in range(4):
        alone = sample(toy, 4, requests(toy, 1, new[i], seeds[i]), n=3, **settings)
        part = slice(3 * i, 3 * i + 3)
        assert tokens_of(together)[part] == tokens_of(alone)
        np.testing.assert_array_equal(together.log_evidence[part], alone.log_evidence)
        np.testing.assert_array_equal(
            together.effective_sample_size[part], alone.effective_sample_size
        )


def test_copies_keep_the_keys_of_their_places(toy):
    decoder, batch = decoder_of(toy), requests(toy)
    rows = batch.prompts, batch.lengths, batch.limits, batch.seeds, batch.samples
    state = decoder.prefill(toy.params, *rows, capacity=batch.capacity)
    places = np.arange(4, dtype=np.int32)
    four = np.zeros(4, np.int32)
    state = decoder.fork(toy.params, state, four, batch.limits[four], batch.seeds[four], places)
    state = dataclasses.replace(state, tokens=state.tokens.at[:, 1].set(places))
    zeros = jnp.zeros(1)
    particles = Particles(
        state, jnp.int32(1), jnp.log(jnp.array([[0.0, 0, 4, 0]])), zeros, zeros, zeros, zeros
    )
    layout = CacheLayout.of(toy.module(), batch.capacity)
    schedule = Schedule(None, None, 0.5, 1)
    program = ParticleFilter(toy.graphdef, 4)
    after = program._resample(layout, particles, jax.random.split(jax.random.key(0), 1), schedule)
    np.testing.assert_array_equal(after.state.tokens[:, 1], 2)
    np.testing.assert_array_equal(
        jax.random.key_data(after.state.key), jax.random.key_data(state.key)
    )
    np.testing.assert_array_equal(after.log_weight, 0)
    assert after.resamplings == 1


def test_sharded_equals_one_device(toy):
    """Two sets of six straddle four shares of three rows."""
    settings = {"num_particles": 6, "resample_threshold": 0.8, "ladder": 2}
    one, many = (
        sample(model, 4, requests(model, 2), **settings) for model in (toy, toys.sharded(toy))
    )
    assert tokens_of(one) == tokens_of(many)
    np.testing.assert_allclose(one.log_evidence, many.log_evidence, atol=1e-5)
    np.testing.assert_allclose(one.effective_sample_size, many.effective_sample_size, rtol=1e-5)
    assert one.tokens_decoded == many.tokens_decoded


def test_copies_of_a_hybrid_take_their_state_along(hybrid):
    """What was drawn is as probable as one uncached pass says."""
    batch, n = make_batch(hybrid, PROMPTS, None, 8, 3, ()), 4
    settings = {"num_particles": 8, "resample_threshold": 2.0, "n": n}
    found = sample_smc(hybrid, batch, alpha=4.0, t_max=8, **settings)
    prompts = [p for p in PROMPTS for _ in range(n)]
    rows = [[*hybrid.tokenizer.encode(p), *t] for p, t in zip(prompts, found.tokens, strict=True)]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    log_p = np.asarray(jax.nn.log_softmax(hybrid(ids)[0]))
    for i, row in enumerate(rows):
        places = np.arange(len(row) - 8, len(row))
        expected = log_p[i, places - 1, np.array(row)[places]].sum()
        np.testing.assert_allclose(found.logprob[i], expected, rtol=1e-4)


def test_systematic_places():
    rng = np.random.default_rng(0)
    weight = rng.dirichlet(np.full(8, 0.3), 5).astype(np.float32)
    weight[:, [0, 3, 7]] = 0
    weight /= weight.sum(1, keepdims=True)
    grid = np.arange(400) / 400
    counts = np.zeros((len(grid), 5, 8))
    for i, u in enumerate(grid):
        places = np.asarray(systematic(weight * 3, np.full(5, u, np.float32)))
        counts[i] = [np.bincount(row, minlength=8) for row in places]
    assert (counts[..., [0, 3, 7]] == 0).all()
    assert (np.abs(counts - 8 * weight) < 1 + 1e-5).all()
    # Unbiased: averaged over u, a particle gets N * w places.
    np.testing.assert_allclose(counts.mean(0), 8 * weight, atol=2 / 400)


def test_effective_sample_size():
    log_weight = jnp.log(jnp.array([[1.0, 1, 1, 1], [0, 3, 0, 0], [2, 2, 0, 0]]))
    np.testing.assert_allclose(effective_sample_size(log_weight - 1000), [4, 1, 2], rtol=1e-3)


def test_ladders():
    np.testing.assert_allclose(exponents_of(4, None), [4])
    for ladder in (3, np.int64(3)):
        np.testing.assert_allclose(exponents_of(4, ladder), [1, 2, 3, 4])
    np.testing.assert_allclose(exponents_of(2, [0.5, 1]), [0.5, 1, 2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.0}, "alpha=0"),
        ({"num_particles": 0}, "num_particles=0"),
        ({"resample_every": 0}, "resample_every=0"),
        ({"resample_threshold": -1.0}, "resample_threshold=-1"),
        ({"tau": 1e-6}, "tau=1e-06"),
        ({"ladder": 0}, "ladder=0"),
        ({"ladder": [3.0, 1.0]}, r"ladder=\[3.0, 1.0\]"),
        ({"ladder": [5.0]}, r"ladder=\[5.0\]"),
        ({"n": 0}, "n=0"),
    ],
)
def test_bad_settings_are_named(toy, settings, words):
    with pytest.raises(InputError, match=words):
        sample(toy, **{"alpha": 2.0, "num_particles": 2, **settings})
