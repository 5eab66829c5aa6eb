"""Metropolis-Hastings chains: the exact law on an enumerable toy, and one answer on every path.

Laws are compared in total variation (TV) with 40,000 chains, long ones with 10,000. A chain's cuts
are its own where a law is judged (shared cuts make chains dependent). The bounds are the spread of
the TV of as many independent draws: of 40,000, for alpha 2 at most .012, for alpha 4 at most .0057,
in 2000 simulations; of 10,000, twice that.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import (
    TableConfig,
    frequencies,
    golden,
    golden_model,
    hybrid_model,
    table_model,
    total_variation,
)

import jaxalope
from jaxalope import InputError, Temperature
from jaxalope.infer.metropolis import Metropolis
from jaxalope.infer.power import expected_tokens, power_sample, sample_mh
from jaxalope.infer.request import make_batch
from jaxalope.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.long

CHAINS = 40_000
NUMBERS = golden()


def chains_of(model, alpha, block, steps, cut="padded", *, t_max=4, n=CHAINS, tau=None, **settings):
    """As ``power_sample(..., share_cut=False)``, on a canvas no wider than the toy needs."""
    batch = make_batch(model, [[0]], None, t_max, 0, [NUMBERS["EOS"]] if t_max == 4 else [])
    batch = dataclasses.replace(batch, prompts=batch.prompts[:, :2], capacity=t_max + 2)
    kept = {"reuse": "shadow", "stride": 2} | settings
    chains = Metropolis(
        model.graphdef, t_max, block, steps, cut, False, kept["reuse"], kept["stride"]
    )
    return sample_mh(model, batch, chains, alpha=alpha, tau=tau or 1 / alpha, n=n)


def law(*args, **settings):
    """The frequencies of the toy's sequences after so many steps in every block."""
    return frequencies(chains_of(*args, **settings).tokens, NUMBERS)


def case(alpha):
    return NUMBERS["cases"][str(float(alpha))]


@pytest.mark.parametrize(
    ("recurrent", "alpha", "steps", "block", "bound"),
    [
        (False, 2, 64, 1, 0.03),
        (True, 2, 64, 2, 0.03),
        (False, 2, 64, 4, 0.03),
        (False, 4, 256, 2, 0.016),
    ],
)
def test_long_chains_reach_the_target(recurrent, alpha, steps, block, bound):
    found = law(golden_model(recurrent), alpha, block, steps, n=10_000)
    assert total_variation(found, case(alpha)["target"]) < bound


@pytest.mark.parametrize("alpha", [2, 4])
@pytest.mark.parametrize("cut", ["padded", "live", "entropy"])
def test_short_chains_are_as_far_off_as_theory_says(alpha, cut):
    """10 steps of one block are not converged; the exact distance is known for every cut."""
    found = law(golden_model(), alpha, 4, 10, cut)
    exact = case(alpha)[f"kernel_{cut}"]["tv_from_lowtemp"]["10"]
    assert abs(total_variation(found, case(alpha)["target"]) - exact) < 0.006


@pytest.mark.parametrize(("alpha", "away"), [(2, 0.09), (4, 0.09)])
def test_without_steps_it_is_low_temperature(alpha, away):
    found = law(golden_model(), alpha, 4, 0)
    assert total_variation(found, case(alpha)["lowtemp"]) < 0.015
    assert total_variation(found, case(alpha)["target"]) > away


def test_grid_cuts_and_other_proposals_have_the_same_target():
    found = law(golden_model(True), 2, 4, 64, "grid", n=10_000)
    assert total_variation(found, case(2)["target"]) < 0.03
    found = law(golden_model(), 2, 4, 64, tau=0.8, n=10_000)
    assert total_variation(found, case(2)["target"]) < 0.03


def test_published_toys():
    """Where two futures of .25 beat one of .40 at low temperature, and do not under the power."""
    for name, depth in (("paper_toy", 2), ("plan_guess", 2)):
        toy = NUMBERS[name]
        p = np.array(toy["p"]).reshape(2, 2)
        with np.errstate(divide="ignore"):
            first = np.log(p.sum(1))
            second = np.log(p / p.sum(1, keepdims=True))
        model = table_model(TableConfig(2, 1), np.maximum(np.stack([first, *second]), -1e9))
        alpha = float(toy["alpha"])
        out = chains_of(model, alpha, depth, 40, t_max=depth, n=20_000)
        found = np.bincount([2 * t[0] + t[1] for t in out.tokens], minlength=4) / 20_000
        # The spread of 20,000 draws: .0035 each, and a false alarm beyond 4.3 of them is 1e-4.
        np.testing.assert_allclose(found, toy["power"], atol=0.015)


def test_alpha_one_accepts_everything():
    out = power_sample(golden_model(), [[0]], n=512, alpha=1, block=2, n_mcmc=8, t_max=4)
    np.testing.assert_array_equal(out.acceptance, 1.0)


@pytest.fixture(scope="module")
def hybrid():
    return hybrid_model()


PROMPTS = [[5, 6, 7], [9], list(range(40, 60))]
SETTINGS = {"alpha": 1.5, "block": 8, "n_mcmc": 5, "t_max": 24, "stop_tokens": [17], "n": 4}


def same(a, b, rows=slice(None)):
    for x, y in zip(a.tokens[rows], b.tokens, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(a.logprob[rows], b.logprob, atol=1e-3)


@pytest.fixture(scope="module")
def shadowed(hybrid):
    return power_sample(hybrid, PROMPTS, **SETTINGS, stride=4)


def test_every_cache_path_decides_alike(hybrid, shadowed):
    """Snapshots of any stride, kept beside or read again, on the hybrid, in float32."""
    assert 0 < shadowed.moved.min() < 1
    same(power_sample(hybrid, PROMPTS, **SETTINGS, reuse="reread", stride=4), shadowed)
    same(power_sample(hybrid, PROMPTS, **SETTINGS), shadowed)


def test_what_is_stored_is_what_the_model_says(hybrid, shadowed):
    prompts = [p for p in PROMPTS for _ in range(SETTINGS["n"])]
    rows = [[*p, *tokens] for p, tokens in zip(prompts, shadowed.tokens, strict=True)]
    canvas = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        canvas[i, : len(row)] = row
    # What stands after a row's end changes nothing before it: the model is causal.
    logprobs = np.asarray(jax.nn.log_softmax(hybrid(canvas)[0]))
    for i, (prompt, tokens) in enumerate(zip(prompts, shadowed.tokens, strict=True)):
        at = len(prompt) - 1 + np.arange(len(tokens))
        np.testing.assert_allclose(shadowed.logprob[i], logprobs[i, at, tokens].sum(), atol=1e-3)


def test_a_chain_does_not_depend_on_its_batch(hybrid, shadowed):
    alone = power_sample(hybrid, PROMPTS[1:2], **SETTINGS, stride=4, seed=[1])
    same(shadowed, alone, slice(4, 8))
    fewer = power_sample(hybrid, PROMPTS[:1], **SETTINGS | {"n": 2}, stride=4, seed=[0])
    same(shadowed, fewer, slice(0, 2))


def test_chain_seven_alone_or_among_64():
    model = golden_model()
    settings = {"alpha": 2, "block": 2, "n_mcmc": 16, "t_max": 4, "stop_tokens": [3]}
    many = power_sample(model, [[0]] * 64, **settings, seed=list(range(64)))
    one = power_sample(model, [[0]], **settings, seed=[7])
    np.testing.assert_array_equal(many.tokens[7], one.tokens[0])


def test_sharded_equals_one_device(hybrid, shadowed):
    sharded = hybrid.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    same(power_sample(sharded, PROMPTS, **SETTINGS, stride=4), shadowed)


def test_one_compilation_for_all_blocks():
    model = golden_model(True)
    chains = Metropolis(model.graphdef, 6, 2, 3, stride=2)
    state = chains.start(
        model.params,
        np.zeros((4, 8), np.int32),
        np.ones(4, np.int32),
        np.arange(4),
        np.zeros(4, np.uint32),
        np.arange(4),
        capacity=8,
    )
    for index in range(chains.num_blocks):
        numbers = jnp.float32(2 + index), jnp.float32(0.5), np.full((4, 1), 3, np.int32)
        state, _ = chains.run_block(model.params, state, jnp.int32(index), *numbers)
    assert chains.run_block._cache_size() == 1


def test_tokens_decoded_follow_theory():
    """A model that never stops: T + N sum (end + 1) / 2 tokens a chain, in expectation.

    The mean of 2000 chains with cuts of their own; a false alarm, beyond 4 standard errors, is less
    likely than 1e-4.
    """
    assert expected_tokens(3072, 192, 10) == 133_712
    model, count = table_model(TableConfig(3, 1)), 2000
    out = chains_of(model, 2, 4, 6, t_max=12, n=count)
    variance = 6 * sum((end**2 - 1) / 12 for end in (4, 8, 12))
    error = out.tokens_decoded / count - expected_tokens(12, 4, 6)
    assert abs(error) < 4 * np.sqrt(variance / count)


def test_alpha_raises_the_likelihood(hybrid, shadowed):
    plain = jaxalope.generate(
        hybrid, PROMPTS, Temperature(1.0), SETTINGS["t_max"], n=4, stop_tokens=[17]
    )
    assert shadowed.logprob.mean() > np.mean([x.sum() for x in plain.logprobs])
    assert shadowed.effective_sample_size.shape == (3,)
    assert shadowed.trace.shape == (3, 5, 12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.5}, "alpha=0.5"),
        ({"alpha": None}, "alpha=None must be a number"),
        ({"tau": "1"}, "tau=1 must be positive"),
        ({"block": 2.0}, "block=2.0 must be a whole number"),
        ({"method": "smc", "ladder": 2.0}, "ladder=2.0 must be a whole number"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"cut": "middle"}, "cut='middle'"),
        ({"method": "gibbs"}, "method='gibbs'"),
        ({"reuse": "paged"}, "reuse='paged'"),
        ({"t_max": 0}, "t_max=0"),
        ({"block": 0}, "block=0"),
        ({"particles": 3}, "particles"),
        ({"tau": 1e-5}, "tau=1e-05"),
        ({"alpha": 1e6}, "tau=1e-06"),
        ({"method": "lookahead", "tau": 0.5}, "tau=0.5 is of method=mh or smc"),
        ({"method": "smc", "cut": "grid"}, "cut='grid' is of method=mh"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[9]]}, "token id 9"),
    ],
)
def test_bad_input_is_named(settings, words):
    with pytest.raises(InputError, match=words):
        power_sample(golden_model(), **{"prompts": [[0]]} | settings)
