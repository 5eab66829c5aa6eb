import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalope.configs import Muon, NextToken
from jaxalope.errors import InputError
from jaxalope.sharding import AxisRules, MeshConfig, make_mesh, use_mesh
from jaxalope.train.objectives import make_objective
from jaxalope.train.optimizers import flatten
from jaxalope.train.step import (
    abstract_state,
    batch_sharding,
    init_state,
    make_eval_step,
    make_train_step,
    summarise,
)

BIAS = "block.router.bias"
AVERAGED = {"ema_decay": 0.5, "balance_rate": 0.0}


@pytest.fixture(scope="module")
def run(toy):
    """``run(experiment, batches)``: ``(state, metrics of every step)`` on the experiment's mesh."""

    @functools.cache
    def compiled(experiment, on_mesh):
        mesh = make_mesh(experiment.mesh) if on_mesh else None
        _, abstract = abstract_state(experiment, mesh, build=toy.build)
        graphdef, state = init_state(experiment, mesh, build=toy.build)
        return mesh, abstract, jax.device_get(state), make_train_step(experiment, graphdef)

    def run(experiment, batches, on_mesh=False):
        mesh, abstract, start, step = compiled(experiment, on_mesh)
        state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), start, abstract)
        metrics = []

        def go(state):
            for batch in batches:
                if mesh is not None:
                    batch = jax.device_put(batch, batch_sharding(experiment, mesh))
                state, m = step(state, batch)
                metrics.append(jax.device_get(m))
            return state

        if mesh is None:
            state = go(state)
        else:
            with use_mesh(mesh, experiment.rules):
                state = go(state)
            for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert b.sharding.is_equivalent_to(a.sharding, b.ndim)
        return jax.device_get(state), metrics

    return run


def _close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def batches(toy):
    return [toy.batch(seed=i) for i in range(3)]


def test_accumulated_equals_the_whole_batch(toy, run, batches):
    whole, m1 = run(toy.experiment(), batches)
    parts, m4 = run(toy.experiment(train={"accumulation": 4}), batches)
    # The microbatches hold different numbers of targets: a mean of their means would differ.
    inside = batches[0]["segment_ids"]
    targets = (inside[:, 1:] == inside[:, :-1]) & (inside[:, 1:] > 0)
    assert len({int(targets[i::4].sum()) for i in range(4)}) > 1
    _close(m1, m4, rtol=1e-5)
    _close(whole.params, parts.params, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "rules", "accumulation"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), AxisRules(), 2),
        (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), AxisRules(), 1),
        (MeshConfig(data=2, context=4), AxisRules(seq="context"), 1),
        (MeshConfig(data=2, fsdp=2, tensor=2, explicit=False), AxisRules(), 1),
    ],
    ids=["data+fsdp+tensor", "fsdp+expert+tensor", "context", "auto"],
)
def test_sharded_equals_one_device(toy, run, batches, mesh, rules, accumulation):
    experiment = toy.experiment(optimizer=Muon(), train={"ema_decay": 0.5})
    alone, m1 = run(experiment, batches)
    train = dataclasses.replace(experiment.train, accumulation=accumulation)
    sharded = dataclasses.replace(experiment, mesh=mesh, rules=rules, train=train)
    state, m8 = run(sharded, batches, on_mesh=True)
    _close(m1, m8, rtol=2e-5)
    _close(alone, state, atol=2e-6)


def test_frozen_parameters_stay_byte_identical(toy, run, batches):
    trainable = r".*\.(q_proj|conv)\..*"
    experiment = toy.experiment(optimizer=Muon(trainable=trainable), train={"ema_decay": 0.9})
    _, before = init_state(experiment, build=toy.build)
    after, _ = run(experiment, batches)
    trained = {"block.q_proj.kernel", "block.conv.kernel"}
    old, new = flatten(before.params), flatten(after.params)
    assert {n for n in old if np.any(np.asarray(old[n]) != new[n])} == trained
    average = flatten(after.ema)
    assert {n for n in old if np.any(np.asarray(old[n]) != average[n])} == trained
    assert set(after.opt_state.muon.momentum) | set(after.opt_state.adamw.mu) == trained


def test_a_step_that_is_not_finite_leaves_the_state_alone(toy, run, batches):
    broken = batches[0] | {"loss_weights": np.full((8, 8), np.nan, np.float32)}
    experiment = toy.experiment(train=AVERAGED)
    good = [b | {"loss_weights": np.ones((8, 8), np.float32)} for b in batches]
    expected, _ = run(experiment, good)
    state, metrics = run(experiment, [good[0], broken, *good[1:]])
    assert [bool(m["finite"]) for m in metrics] == [True, False, True, True]
    assert not np.isfinite(metrics[1]["loss"])
    _same(expected, state)
    assert state.step == 3


def test_the_bias_follows_the_loads_and_stops_when_told(toy, run, batches):
    experiment = toy.experiment(train={"balance_rate": 0.25, "balance_steps": 1})
    _, start = init_state(experiment, build=toy.build)
    graph = toy.build(jax.random.key(experiment.train.seed))
    stats = make_objective(NextToken())(graph, batches[0], None)[2]["stats"]
    load = np.asarray(stats["block"]["router"]["bias"])
    assert load.sum() == 2 * (batches[0]["segment_ids"] > 0).sum()
    sign = np.sign(load.mean(-1, keepdims=True) - load)
    expected = 0.25 * (sign - sign.mean(-1, keepdims=True))
    assert np.abs(expected).max() > 0.1
    for count in (1, 3):
        state, metrics = run(experiment, batches[:count])
        np.testing.assert_allclose(flatten(state.params)[BIAS], expected, atol=1e-6)
    imbalance = (load.max(-1) / load.mean(-1)).max()
    np.testing.assert_allclose(metrics[0]["load_imbalance"], imbalance, rtol=1e-6)
    unmoved, _ = run(toy.experiment(train=AVERAGED), batches[:1])
    np.testing.assert_array_equal(flatten(unmoved.params)[BIAS], flatten(start.params)[BIAS])


def test_the_average_follows_the_parameters(toy, run, batches):
    experiment = toy.experiment(train=AVERAGED)
    _, start = init_state(experiment, build=toy.build)
    one, _ = run(experiment, batches[:1])
    _same(start.ema, start.params)
    _close(one.ema, jax.tree.map(lambda a, b: (a + b) / 2, start.params, one.params), atol=1e-6)


def test_the_norm_is_reported_before_clipping_and_clipped_after(toy, run, batches):
    free, m = run(toy.experiment(train={"clip_norm": None}), batches[:1])
    clipped, c = run(toy.experiment(train={"clip_norm": 0.1}), batches[:1])

    def norm(state):
        # The first moment after one step is (1 - b1) times the gradient.
        moments = state.opt_state.adamw.mu.values()
        return 10 * np.sqrt(sum(np.sum(np.square(x)) for x in moments))

    assert c[0]["grad_norm"] > 0.1
    np.testing.assert_allclose(m[0]["grad_norm"], c[0]["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(norm(free), m[0]["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(norm(clipped), 0.1, rtol=1e-5)
    params = flatten(clipped.params).values()
    expected = np.sqrt(sum(np.sum(np.square(x)) for x in params))
    np.testing.assert_allclose(c[0]["param_norm"], expected, rtol=1e-6)
    np.testing.assert_allclose(c[0]["lr"], 5e-3)


def test_loss_falls(toy, run, batches):
    experiment = toy.experiment(optimizer=Muon(), train={"ema_decay": 0.5})
    _, metrics = run(experiment, [batches[0]] * 8)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]


def test_evaluation_sums_over_parts_are_those_of_the_whole(toy):
    experiment = toy.experiment(objective=NextToken(z_loss=0.1))
    graphdef, state = init_state(experiment, build=toy.build)
    evaluate = make_eval_step(experiment, graphdef)
    batch = toy.batch()
    halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    whole = summarise(evaluate(state.params, batch))
    sums = jax.tree.map(jnp.add, *(evaluate(state.params, half) for half in halves))
    _close(whole, summarise(sums), rtol=1e-5)
    assert set(whole) == {"loss", "weight", "nll", "z_loss", "accuracy"}
    np.testing.assert_allclose(whole["loss"], whole["nll"] + whole["z_loss"], rtol=1e-6)
    nothing = {k: np.zeros_like(v) for k, v in batch.items()}
    assert summarise(evaluate(state.params, nothing))["loss"] == 0


def test_a_batch_that_does_not_fit_the_mesh_names_both(toy):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with pytest.raises(
        InputError, match=r"data.batch_size=8 / train.accumulation=2 = 4 rows .*fsdp"
    ):
        init_state(toy.experiment(train={"accumulation": 2}), mesh, build=toy.build)
    mesh = make_mesh(MeshConfig(data=2, context=4))
    with pytest.warns(UserWarning, match=r"mesh\.context=4: .*4 devices do the work of one"):
        abstract_state(toy.experiment(), mesh, build=toy.build)
    mesh = make_mesh(MeshConfig(data=1, context=8))
    with pytest.raises(InputError, match=r"data.sequence_length=12 .* context=8"):
        rules = AxisRules(seq="context")
        abstract_state(toy.experiment(length=12, rules=rules), mesh, build=toy.build)
