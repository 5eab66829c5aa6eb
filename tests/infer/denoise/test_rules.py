"""Unmasking rules against slow loops in float64, and against hand-made examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalope.errors import InputError
from jaxalope.infer.denoise.rules import (
    Dynamic,
    EntropyBounded,
    Factor,
    Independent,
    Progress,
    Threshold,
    TopCount,
    TopQuota,
    dream,
    stack_rules,
    take_top,
)
from jaxalope.infer.denoise.schedules import SCHEDULES, masked_share, share

RNG = np.random.default_rng(0)


def progress(step=0, steps=1, masked=8, uniform=None, rows=1):
    full = [jnp.full((rows,), x, jnp.int32) for x in (step, steps, masked)]
    return Progress(*full, uniform)


def cases(count=200, width=9):
    """Confidences, some of them tied and some near one, and masks with at least one position."""
    conf = RNG.choice([0.05, 0.3, 0.5, 0.5, 0.7, 0.9, 0.93, 0.99], (count, width))
    conf = np.where(RNG.random((count, width)) < 0.5, conf, RNG.random((count, width)))
    masked = RNG.random((count, width)) < 0.6
    masked[np.arange(count), RNG.integers(0, width, count)] = True
    return conf, masked


def descending(conf, masked):
    """Masked positions by falling confidence, ties from the left."""
    return sorted(np.flatnonzero(masked), key=lambda i: (-conf[i], i))


def check(rule, oracle, state=None, score=np.log):
    conf, masked = cases()
    state = progress(rows=len(conf)) if state is None else state
    chosen = np.asarray(
        jax.jit(type(rule).select)(rule, jnp.asarray(score(conf), jnp.float32), masked, state)
    )
    assert not np.any(chosen & ~masked)
    for i in range(len(conf)):
        want = np.zeros(conf.shape[1], bool)
        want[oracle(conf[i], masked[i], descending(conf[i], masked[i]))] = True
        np.testing.assert_array_equal(chosen[i], want, err_msg=f"{conf[i]} {masked[i]}")


def test_threshold_takes_all_that_are_sure_and_the_surest():
    def oracle(conf, masked, order):
        return [i for i in order if conf[i] >= 0.6] or order[:1]

    check(Threshold(0.6), oracle)
    check(Threshold(1.0), lambda conf, masked, order: order[:1])


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_factor_is_the_longest_run_under_the_bound(factor):
    def oracle(conf, masked, order):
        n = 1
        while n < len(order) and conf[order[n]] >= 1 - factor / (n + 2):
            n += 1
        return order[:n]

    check(Factor(factor), oracle)


def test_dynamic_falls_back_to_the_quota():
    def oracle(conf, masked, order):
        sure = [i for i in order if conf[i] > 0.6]
        return sure if len(sure) >= 3 else order[:3]

    check(Dynamic(0.6), oracle, progress(0, 3, 9, rows=200))


def test_entropy_bounded_spends_its_budget():
    def oracle(conf, masked, order):
        n, spent = 1, conf[order[::-1][0]]
        order = sorted(order, key=lambda i: (conf[i], i))
        spent = conf[order[0]]
        while n < len(order) and spent + conf[order[n]] <= 1.3:
            spent += conf[order[n]]
            n += 1
        return order[:n]

    check(EntropyBounded(1.3), oracle, score=np.negative)


def test_top_takes_the_quota_from_the_left_among_equals():
    check(TopQuota(), lambda conf, masked, order: order[:2], progress(1, 4, 7, rows=200))
    check(TopCount(3), lambda conf, masked, order: order[:3])
    tied = take_top(jnp.zeros((1, 5)), jnp.array([[False, True, True, False, True]]), 2)
    assert tied.tolist() == [[False, True, True, False, False]]


def test_even_quotas_give_the_first_steps_the_remainder():
    for masked, steps in ((16, 4), (7, 4), (3, 5), (0, 2)):
        got = [int(progress(i, steps, masked).quota[0]) for i in range(steps)]
        assert got == [masked // steps + (i < masked % steps) for i in range(steps)]
        assert sum(got) == masked


def test_a_position_that_must_come_last_still_comes():
    last = jnp.array([[-jnp.inf, -jnp.inf, -1.0]])
    masked = jnp.array([[True, True, False]])
    for rule in (Threshold(0.5), Factor(1.0), TopCount(1), EntropyBounded(1.0), Dynamic(0.5)):
        assert rule.select(last, masked, progress(0, 2, 2)).tolist() == [[True, False, False]]
    noisy = progress(0, 2, 2, jnp.full((1, 3), 0.99))
    rule = TopQuota(temperature=5.0)
    assert rule.select(last, jnp.ones((1, 3), bool), noisy).tolist() == [[False, False, True]]


def schedule_oracle(schedule, masked, steps):
    """The quotas of successive steps as the published scripts take them, zeros left out."""
    if schedule == "dream":
        t = np.linspace(1, 1e-3, steps + 1)
        take = [lambda n, i=i: int(n * (1 - t[i + 1] / t[i])) for i in range(steps)]
    else:
        alpha = {
            "linear": lambda t: 1 - t,
            "poly2": lambda t: 1 - t**2,
            "cosine": lambda t: 1 - np.cos(np.pi / 2 * (1 - t)),
        }[schedule]
        t = 1 - np.arange(steps + 1) / steps
        kept = [(1 - alpha(t[i + 1])) / (1 - alpha(t[i])) for i in range(steps)]
        # Halves as the exact numbers have them, not as a difference of two rounded ones does.
        take = [lambda n, k=k: int(np.round(np.round(n * (1 - k), 9))) for k in kept]
    quotas = []
    for i in range(steps):
        quota = masked if i == steps - 1 else take[i](masked)
        masked -= quota
        quotas += [quota] if quota else []
    return quotas


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("masked", "steps"), [(16, 4), (13, 5), (5, 16), (64, 7)])
def test_schedules_spread_the_masks_as_published(schedule, masked, steps):
    rule = TopQuota(schedule=schedule)
    left, state, got = np.ones((1, masked), bool), progress(0, steps, masked), []
    score = jnp.asarray(RNG.standard_normal((1, masked)), jnp.float32)
    while left.any():
        settled = rule.settle(jnp.asarray(left), state)
        now = dataclasses.replace(settled, uniform=jnp.zeros((1, masked)))
        chosen = np.asarray(rule.select(score, jnp.asarray(left), now))
        got.append(int(chosen.sum()))
        left &= ~chosen
        state = dataclasses.replace(state, step=settled.step + 1)
    assert got == schedule_oracle(schedule, masked, steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shares_add_up_to_what_is_masked(schedule):
    steps = 9
    for i in range(steps):
        kept = masked_share(schedule, i + 1, steps) / masked_share(schedule, i, steps)
        assert float(share(schedule, jnp.int32(i), jnp.int32(steps))) == pytest.approx(
            1 - float(kept), abs=1e-5
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_independent_positions_are_revealed_with_the_schedules_law(schedule):
    """Frequencies of (first step, second step) of two positions against the product law.

    20,000 runs; a wrong alarm has a probability below 1e-6 (six standard deviations a cell).
    """
    steps, runs = 4, 20_000
    rule = Independent(schedule)

    @jax.jit
    def reveal(key):
        masked = jnp.ones((runs, 2), bool)
        step, when = jnp.zeros((runs,), jnp.int32), jnp.full((runs, 2), -1)
        for i in range(steps):
            uniform = jax.random.uniform(jax.random.fold_in(key, i), (runs, 2))
            state = Progress(step, jnp.full((runs,), steps), jnp.full((runs,), 2), uniform)
            state = rule.settle(masked, state)
            chosen = rule.select(jnp.zeros((runs, 2)), masked, state)
            when = jnp.where(chosen, state.step[:, None], when)
            masked, step = masked & ~chosen, state.step + 1
        return when

    when = np.asarray(reveal(jax.random.key(0)))
    assert when.min() >= 0 and when.max() < steps
    at = np.array([float(masked_share(schedule, i, steps)) for i in range(steps + 1)])
    law = np.outer(-np.diff(at), -np.diff(at))
    counts = np.zeros((steps, steps))
    np.add.at(counts, (when[:, 0], when[:, 1]), 1)
    spread = np.sqrt(law * (1 - law) / runs)
    assert np.all(np.abs(counts / runs - law) < 6 * spread + 1e-9)


def test_choice_temperature_draws_by_the_softmax_of_probabilities():
    """First picks at a temperature; a wrong alarm has a probability below 1e-6."""
    runs, conf = 20_000, np.array([0.2, 0.5, 0.9])
    uniform = jax.random.uniform(jax.random.key(1), (runs, 3))
    state = progress(0, 3, 3, uniform, rows=runs)
    score = jnp.broadcast_to(jnp.log(jnp.asarray(conf)), (runs, 3))
    chosen = TopQuota(temperature=0.4).select(score, jnp.ones((runs, 3), bool), state)
    law = np.exp(conf / 0.4) / np.exp(conf / 0.4).sum()
    spread = np.sqrt(law * (1 - law) / runs)
    assert np.all(np.abs(np.mean(chosen, axis=0) - law) < 6 * spread)


def test_numbers_may_differ_by_row():
    rule = stack_rules([Threshold(0.5), Threshold(0.95)])
    score = jnp.log(jnp.array([[0.6, 0.9], [0.6, 0.9]]))
    chosen = rule.select(score, jnp.ones((2, 2), bool), progress(rows=2))
    assert chosen.tolist() == [[True, True], [False, True]]
    with pytest.raises(InputError, match="differ in kind"):
        stack_rules([Threshold(0.5), Factor(1.0)])


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Threshold(1.5), "threshold=1.5"),
        (lambda: Factor(0.0), "factor=0.0"),
        (lambda: TopQuota("surest"), "surest"),
        (lambda: TopQuota(schedule="log"), "log"),
        (lambda: TopQuota(temperature=-1.0), "alg_temp=-1.0"),
        (lambda: TopCount(0), "count=0"),
        (lambda: TopCount(None), "count=None must be a whole number"),
        (lambda: Threshold("x"), "threshold='x' must be a probability"),
        (lambda: EntropyBounded(-1.0), "budget=-1.0"),
        (lambda: Independent("even"), "even"),
        (lambda: dream("greedy"), "greedy"),
    ],
)
def test_a_number_out_of_range_is_named(make, field):
    with pytest.raises(InputError, match=field):
        make()
