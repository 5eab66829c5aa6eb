import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.errors import InputError
from jaxalope.layers.decoding_heads import (
    DecodingHeads,
    distribution_stats,
    hard_top_p,
    soft_top_p,
    soft_top_p_mask,
    tempered,
)
from jaxalope.sharding import (
    AxisRules,
    MeshConfig,
    constrain,
    make_mesh,
    param_axes,
    shardings,
    split,
    use_mesh,
)

# float32 and float64, with the relative tolerance that each has to reach.
PRECISIONS = pytest.mark.parametrize("precision", [("float32", 1e-6), ("float64", 1e-9)], ids=str)


@pytest.fixture(scope="module")
def golden(fixtures):
    with np.load(fixtures / "autodeco" / "soft_topp.npz") as file:
        return dict(file)


@contextlib.contextmanager
def _in(precision, arrays):
    """``(arrays of this dtype, their tolerance)``; T and P without their last dimension of 1."""
    dtype, tolerance = precision
    with jax.enable_x64(dtype == "float64"):
        cast = {n: x if x.dtype == bool else jnp.asarray(x, dtype) for n, x in arrays.items()}
        cast |= {n: cast[n][..., 0] for n in ("T", "P")}
        yield cast, {"rtol": tolerance, "atol": 0}


def _published_weights(golden):
    """The golden heads' parameters in our layout."""
    width = golden["w_t1"].shape[1]
    first, rest = golden["w_p1"][:, :width], golden["w_p1"][:, width:]

    def affine(kernel, bias):
        return {"kernel": kernel.T, "bias": bias}

    return {
        "temperature": {
            "hidden": affine(golden["w_t1"], golden["w_tb1"]),
            "out": affine(golden["w_t2"], golden["w_tb2"]),
        },
        "top_p": {
            "hidden": affine(first, golden["w_pb1"]),
            "stats": {"kernel": rest.T},
            "out": affine(golden["w_p2"], golden["w_pb2"]),
        },
    }


@PRECISIONS
def test_heads_and_statistics_are_the_published_ones(golden, precision):
    graphdef, _ = split(DecodingHeads(8, rngs=nnx.Rngs(0)))
    with _in(precision, golden) as (g, close):
        heads = nnx.merge(graphdef, jax.tree.map(jnp.asarray, _published_weights(g)))
        temperature, top_p = heads(g["hidden"], g["logits"])
        stats = distribution_stats(g["logits"], temperature)
        assert temperature.dtype == top_p.dtype == g["hidden"].dtype
        np.testing.assert_allclose(temperature, golden["head_T"][..., 0], **close)
        np.testing.assert_allclose(top_p, golden["head_P"][..., 0], **close)
        np.testing.assert_allclose(stats, golden["head_stats"], **close)


@PRECISIONS
def test_probabilities_mask_and_both_rules_are_the_published_ones(golden, precision):
    with _in(precision, golden) as (g, close):
        probs = tempered(g["logits"], g["T"])
        np.testing.assert_allclose(probs, golden["probs"], **close)
        # An exponent of 30 times a float32 mass: its rounding is 30 times as large in the mask.
        close["rtol"] *= 10
        mask = soft_top_p_mask(probs, g["P"])
        np.testing.assert_allclose(mask, golden["mask"], **close)
        soft = soft_top_p(g["logits"], g["T"], g["P"])
        np.testing.assert_allclose(soft, golden["soft"], **close)
        keep = hard_top_p(g["logits"], g["T"], g["P"])
        np.testing.assert_array_equal(keep, golden["hard_keep"])


@pytest.mark.parametrize(
    ("features", "count"),
    [(2048, 1_050_882), (2880, 1_476_866), (3584, 1_837_314), (4096, 2_099_458)],
)
def test_parameter_counts_are_those_of_the_published_heads(features, count):
    heads = nnx.eval_shape(lambda: DecodingHeads(features, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(split(heads)[1])) == count


def test_fresh_heads_say_one_and_the_mass_asked_for():
    heads = DecodingHeads(16, 8, rngs=nnx.Rngs(0), temperature=1.0, top_p=0.9)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.bfloat16)
    temperature, top_p = heads(hidden, 5 * jax.random.normal(jax.random.key(1), (2, 3, 12)))
    assert temperature.dtype == top_p.dtype == jnp.float32
    np.testing.assert_allclose(temperature, np.ones((2, 3)), rtol=1e-6)
    np.testing.assert_allclose(top_p, np.full((2, 3), 0.9), rtol=1e-6)


def test_gradients_reach_the_heads_alone_and_not_the_temperature_through_top_p():
    graphdef, params = split(DecodingHeads(4, 8, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x + 0.1, params)
    hidden = jax.random.normal(jax.random.key(0), (1, 3, 4))
    logits = jax.random.normal(jax.random.key(1), (1, 3, 12))

    def top_p(params, hidden, logits):
        return jnp.sum(nnx.merge(graphdef, params)(hidden, logits)[1])

    by_params, *by_inputs = jax.grad(top_p, argnums=(0, 1, 2))(params, hidden, logits)
    assert all(np.any(x) for x in jax.tree.leaves(by_params["top_p"]))
    assert not any(np.any(x) for x in jax.tree.leaves((by_params["temperature"], by_inputs)))


@pytest.fixture(scope="module")
def random():
    """Logits without ties, temperatures and top-p."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(50, 40)) * 2, rng.uniform(0.5, 1.5, 50), rng.uniform(0.05, 0.99, 50)


def _oracle(logits, temperature, top_p):
    """``(probabilities, mass of all tokens as likely or likelier)``, one token at a time."""
    probs, mass = np.zeros_like(logits), np.zeros_like(logits)
    for row in range(len(logits)):
        e = np.exp((logits[row] - logits[row].max()) / temperature[row])
        probs[row] = e / e.sum()
        total = 0.0
        for i in sorted(range(len(e)), key=lambda i: (-probs[row, i], i)):
            total += probs[row, i]
            mass[row, i] = total
    return probs, mass


def test_rules_follow_the_ranked_mass(random):
    logits, temperature, top_p = random
    probs, mass = _oracle(logits, temperature, top_p)
    kept = probs * np.exp(-7 * np.maximum(mass - top_p[:, None], 0))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in random]
        keep = hard_top_p(*arrays)
        soft = soft_top_p(*arrays, sharpness=7.0)
    np.testing.assert_array_equal(keep, mass - probs < top_p[:, None])
    assert 1 < np.sum(keep, axis=-1).mean() < 39
    np.testing.assert_allclose(soft, kept / (kept.sum(-1, keepdims=True) + 1e-9), rtol=1e-9)


def test_equals_are_ranked_by_index():
    logits = jnp.zeros((1, 4))
    np.testing.assert_array_equal(hard_top_p(logits, 1.0, 0.5), [[1, 1, 0, 0]])
    np.testing.assert_allclose(
        soft_top_p_mask(jnp.full((1, 4), 0.25), 0.5), [[1, 1, np.exp(-7.5), np.exp(-15)]], rtol=1e-6
    )


def test_limits(random):
    logits, temperature, top_p = (jnp.asarray(x, jnp.float32) for x in random)
    probs = tempered(logits, temperature)
    # P -> 1: nothing is masked.
    np.testing.assert_allclose(soft_top_p_mask(probs, 1.0), np.ones(probs.shape), atol=1e-6)
    np.testing.assert_allclose(soft_top_p(logits, temperature, 1.0), probs, atol=1e-6)
    # Sharpness -> infinity: the hard rule without the token that crosses.
    hard = np.asarray(hard_top_p(logits, temperature, top_p))
    sharp = np.asarray(soft_top_p_mask(probs, top_p, 1e9))
    assert np.all((sharp > 1 - 1e-6) | (sharp < 1e-6))
    lost = hard & (sharp < 0.5)
    assert not np.any((sharp > 0.5) & ~hard)
    np.testing.assert_array_equal(lost.sum(-1), np.ones(len(hard)))
    crossing = np.where(hard, probs, np.inf).argmin(-1)
    np.testing.assert_array_equal(lost.argmax(-1), crossing)
    # T -> 0: the most likely token and no other, by any rule, the first of equals included.
    greedy = jax.nn.one_hot(jnp.argmax(logits, -1), 40)
    np.testing.assert_allclose(tempered(logits, 0.0), greedy, atol=1e-6)
    soft = soft_top_p(logits, 0.0, top_p)
    np.testing.assert_allclose(soft / soft.sum(-1, keepdims=True), greedy, atol=1e-6)
    np.testing.assert_array_equal(hard_top_p(logits, 0.0, top_p), greedy.astype(bool))
    # P -> 0 keeps one token.
    np.testing.assert_array_equal(
        hard_top_p(logits, temperature, jnp.zeros(50)).sum(-1), np.ones(50)
    )


def test_mask_is_differentiable_as_finite_differences_say(random):
    def total(t, p):
        return jnp.sum(jnp.log(soft_top_p(logits, t, p)[:, 3]))

    with jax.enable_x64(True):
        logits, temperature, top_p = (jnp.asarray(x[:8]) for x in random)
        grads = jax.grad(total, argnums=(0, 1))(temperature, top_p)
        for i, got in enumerate(grads):
            at = [temperature, top_p]
            for k in range(8):
                step = np.zeros(8)
                step[k] = 1e-6
                above, below = ([*at] for _ in range(2))
                above[i], below[i] = at[i] + step, at[i] - step
                slope = (total(*above) - total(*below)) / 2e-6
                np.testing.assert_allclose(got[k], slope, rtol=1e-5, atol=1e-6)


def test_a_sharded_vocabulary_and_width_give_the_values_of_one_device():
    graphdef, params = split(DecodingHeads(16, 8, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x + 0.1, params)
    hidden = jax.random.normal(jax.random.key(0), (4, 2, 16))
    logits = 3 * jax.random.normal(jax.random.key(1), (4, 2, 24))

    def run(params, hidden, logits):
        return nnx.merge(graphdef, params)(hidden, logits)

    alone = jax.device_get(jax.jit(run)(params, hidden, logits))
    for config in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(tensor=8, explicit=False)):
        mesh = make_mesh(config)
        with use_mesh(mesh):
            places = shardings(params, param_axes(nnx.merge(graphdef, params)), mesh, AxisRules())

            def laid_out(params, hidden, logits):
                logits = constrain(logits, "batch", "seq", "vocab")
                return run(params, constrain(hidden, "batch", "seq", "embed"), logits)

            sharded = jax.jit(laid_out)(jax.device_put(params, places), hidden, logits)
        for a, b in zip(alone, sharded, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_numbers_out_of_range_are_named():
    logits = jnp.zeros((1, 4))
    for top_p in (0, -0.1, 1.5):
        with pytest.raises(InputError, match=rf"top_p={top_p} must be above 0 and at most 1"):
            soft_top_p(logits, 1.0, top_p)
        with pytest.raises(InputError, match=rf"top_p={top_p} "):
            hard_top_p(logits, 1.0, top_p)
    with pytest.raises(InputError, match=r"sharpness=0"):
        soft_top_p(logits, 1.0, 0.9, 0.0)
    with pytest.raises(InputError, match=r"initial_top_p=1.0 must be above 0 and below 1"):
        DecodingHeads(4, rngs=nnx.Rngs(0), top_p=1.0)
    with pytest.raises(InputError, match=r"initial_temperature=2.0 must be between 0 and 2"):
        DecodingHeads(4, rngs=nnx.Rngs(0), temperature=2.0)
