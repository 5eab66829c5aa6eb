import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxalope.configs import NextToken
from jaxalope.sharding import MeshConfig, make_mesh, use_mesh
from jaxalope.train.objectives import cross_entropy, make_objective
from jaxalope.train.sums import shift

KEY = jax.random.key(0)


def _oracle(logits, batch, z_loss):
    """Token by token in float64: (loss, weight, nll, correct)."""
    loss = weight = nll_sum = correct = 0.0
    rows, length = batch["tokens"].shape
    for r in range(rows):
        for t in range(length - 1):
            segment = batch["segment_ids"][r, t]
            if segment == 0 or batch["segment_ids"][r, t + 1] != segment:
                continue
            target = batch["tokens"][r, t + 1]
            w = batch.get("loss_weights", np.ones((rows, length)))[r, t + 1]
            x = logits[r, t].astype(np.float64)
            log_z = np.log(np.sum(np.exp(x)))
            nll = log_z - x[target]
            loss += w * (nll + z_loss * log_z**2)
            nll_sum += w * nll
            weight += w
            correct += w * (np.argmax(x) == target)
    return loss, weight, nll_sum, correct


@pytest.mark.parametrize("weighted", [False, True])
def test_next_token_is_the_sum_over_targets_inside_documents(toy, weighted):
    model, batch = toy.build(KEY), toy.batch()
    if weighted:
        rng = np.random.default_rng(1)
        batch["loss_weights"] = rng.integers(0, 3, (8, 8)).astype(np.float32) / 2
    logits = np.asarray(model.logits(model.hidden_states(batch["tokens"])[0]))
    expected = _oracle(logits, batch, z_loss=0.1)
    loss, weight, sums = jax.jit(lambda b: make_objective(NextToken(z_loss=0.1))(model, b, KEY))(
        batch
    )
    got = (loss, weight, sums["nll"], sums["accuracy"])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(loss - sums["nll"], sums["z_loss"], rtol=1e-4)
    assert (weight != 42) if weighted else (weight == 42)
    assert sums["stats"]["block"]["router"]["bias"].shape == (2, 4)


def test_without_segments_a_row_is_one_document():
    targets, weights = shift({"tokens": jnp.array([[5, 6, 7]])})
    np.testing.assert_array_equal(targets[:, :2], [[6, 7]])
    np.testing.assert_array_equal(weights, [[1, 1, 0]])


def _setting(rows=2, length=12, width=4, vocab=10):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32),
        jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32),
        jnp.asarray(rng.uniform(size=(rows, length)), jnp.float32),
    )


def _loss(hidden, head, targets, weights, max_logits):
    sums = cross_entropy(
        lambda x: x @ head, hidden, targets, weights, z_loss=0.01, max_logits=max_logits
    )
    return sums["nll"] + sums["z_loss"], sums


@pytest.mark.parametrize("max_logits", [120, 41, 1])
def test_chunked_is_the_whole(max_logits):
    hidden, head, targets, weights = _setting()
    grad = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)
    whole = grad(hidden, head, targets, weights, 10**6)
    chunked = grad(hidden, head, targets, weights, max_logits)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), whole, chunked
    )


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for sub in jaxprs_in_params(equation.params):
            yield from _sizes(sub)


def test_chunks_never_hold_all_logits_in_either_pass():
    hidden, head, targets, weights = _setting(vocab=100)
    grad = jax.grad(lambda h, e, n: _loss(h, e, targets, weights, n)[0], argnums=(0, 1))

    def largest(limit):
        return max(_sizes(jax.make_jaxpr(lambda h, e: grad(h, e, limit))(hidden, head).jaxpr))

    assert largest(10**6) >= 2 * 12 * 100
    # A quarter of the sequence at a time: nothing larger than its logits, or the head's gradient.
    assert largest(600) == 600


def test_a_sharded_vocabulary_gives_the_sums_of_one_device(toy):
    batch = toy.batch()
    objective = make_objective(NextToken(z_loss=0.1, max_logits=64))

    def run(batch):
        loss, weight, sums = objective(toy.build(KEY), batch, KEY)
        return {"loss": loss, "weight": weight, **sums}

    alone = jax.device_get(jax.jit(run)(batch))
    for config in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(tensor=4, explicit=False)):
        with use_mesh(make_mesh(config)):
            sharded = jax.device_get(jax.jit(lambda b: run(b))(batch))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone, sharded)
