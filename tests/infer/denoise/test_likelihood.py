"""The bound on likelihoods against all subsets of masks, and what is drawn."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from slow import MASK, golden_model, random_model, softmax

from jaxalope import InputError, diffusion_log_likelihood
from jaxalope.infer.denoise.likelihood import hide, spread_counts
from jaxalope.sharding import MeshConfig, make_mesh, param_axes, shardings

PROMPTS, ANSWERS = [[10, 78, 63, 13], [7]], [[5, 91, 33, 60], [8]]


@pytest.fixture(scope="module")
def model():
    return golden_model()


def enumerated(model, prompt, answer, cfg=0.0) -> float:
    """The mean over numbers of masks, and over the sets of so many, of the weighted log-likelihood.

    Also its value by the other reading: the mean over orders of the chain rule.
    """
    size, start = len(answer), len(prompt)
    sets = [s for n in range(1, size + 1) for s in itertools.combinations(range(size), n)]
    rows = np.array([prompt + answer] * len(sets))
    for row, hidden in zip(rows, sets, strict=True):
        row[[start + i for i in hidden]] = MASK
    logits = np.asarray(model(jnp.asarray(rows))[0], np.float64)
    if cfg:
        free = rows.copy()
        free[:, :start] = MASK
        free = np.asarray(model(jnp.asarray(free))[0], np.float64)
        logits = free + (cfg + 1) * (logits - free)
    p = np.log(softmax(logits))
    total = {n: [] for n in range(1, size + 1)}
    each = {}
    for i, hidden in enumerate(sets):
        nats = {j: p[i, start + j, answer[j]] for j in hidden}
        each[hidden] = nats
        total[len(hidden)].append(size / len(hidden) * sum(nats.values()))
    bound = np.mean([np.mean(x) for x in total.values()])
    orders = [
        sum(each[tuple(sorted(order[i:]))][order[i]] for i in range(size))
        for order in itertools.permutations(range(size))
    ]
    assert bound == pytest.approx(np.mean(orders), abs=1e-6)
    return bound


@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_the_mean_over_draws_is_the_enumerated_bound(model, cfg):
    """Within five standard errors of 150 batches: a wrong alarm is below 1e-5 a pair."""
    got = diffusion_log_likelihood(
        model, PROMPTS, ANSWERS, n_mc=1200, batch_size=8, cfg_scale=cfg, seed=1
    )
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        want = enumerated(model, prompt, answer, cfg)
        assert abs(got.value[i] - want) < 5 * got.standard_error[i] + 1e-4
    # An answer of one token has nothing to draw.
    assert got.standard_error[1] < 1e-6


def test_draws_are_uniform_in_number_and_place():
    rng = np.random.default_rng(0)
    counts = np.stack([spread_counts(rng, 6, 8) for _ in range(20_000)])
    for row in range(8):
        share = np.bincount(counts[:, row], minlength=7)[1:] / 20_000
        assert np.all(np.abs(share - 1 / 6) < 6 * np.sqrt(5 / 36 / 20_000))
    assert set(np.sort(counts, axis=1)[:, 0].tolist()) == {1}, "a batch leaves a third of 1..A out"
    sets = hide(rng, np.full(20_000, 2), 4)
    assert set(sets.sum(axis=1).tolist()) == {2}
    pairs = np.bincount((sets * [1, 2, 4, 8]).sum(axis=1), minlength=16) / 20_000
    assert np.count_nonzero(pairs) == 6
    assert np.all(np.abs(pairs[pairs > 0] - 1 / 6) < 6 * np.sqrt(5 / 36 / 20_000))


def test_a_pair_does_not_depend_on_its_neighbours_or_devices(model):
    settings = {"n_mc": 16, "batch_size": 8}
    both = diffusion_log_likelihood(model, PROMPTS, ANSWERS, seed=3, **settings)
    alone = diffusion_log_likelihood(model, PROMPTS[1:], ANSWERS[1:], seed=4, **settings)
    assert alone.value[0] == pytest.approx(both.value[1], abs=1e-5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = shardings(model.params, param_axes(model.module()), mesh, model.rules)
    import jax

    eight = dataclasses.replace(model, mesh=mesh, params=jax.device_put(model.params, placed))
    split = diffusion_log_likelihood(eight, PROMPTS, ANSWERS, seed=3, **settings)
    np.testing.assert_allclose(split.value, both.value, atol=1e-4)
    few = diffusion_log_likelihood(eight, PROMPTS, ANSWERS, n_mc=3, seed=3)
    assert np.all(np.isfinite(few.value)) and np.all(np.isnan(few.standard_error))


@pytest.mark.parametrize(
    ("answers", "settings", "message"),
    [
        ([[1]], {}, "answers has 1"),
        ([[1], []], {}, r"answers\[1\] is empty"),
        ([[1], [MASK]], {}, r"answers\[1\]"),
        ([[1], [2]], {"n_mc": 20, "batch_size": 8}, "n_mc=20"),
        ([[1], [2]], {"n_mc": 0}, "n_mc=0"),
        ([[1], [200]], {}, "200"),
        ([[1], [2]], {"cfg_scale": -1.0}, "cfg_scale"),
    ],
)
def test_what_has_no_likelihood_is_named(model, answers, settings, message):
    with pytest.raises(InputError, match=message):
        diffusion_log_likelihood(model, PROMPTS, answers, **settings)


def test_block_diffusion_is_refused():
    with pytest.raises(InputError, match="block_size=4"):
        diffusion_log_likelihood(random_model(block_size=4), PROMPTS, ANSWERS)
