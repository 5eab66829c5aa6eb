"""Truncation: the published numbers, ties, sorts against bisections, and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stages import GOLDENS, oracle

from jaxalope import (
    Chain,
    InputError,
    MinP,
    Predicted,
    SoftTopP,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from jaxalope.infer.policy import Context, stack_rows
from jaxalope.infer.selection import kth_largest, mass_reached, smallest_set, total
from jaxalope.infer.truncation import _distances, _relative
from jaxalope.layers.decoding_heads import hard_top_p, soft_top_p

GOLDEN = np.load(GOLDENS)
LOGITS = jnp.asarray(GOLDEN["logits"], jnp.float32)
# The only row of the goldens that has ties.
TIED = 1


run = jax.jit(lambda policy, logits, context=None: policy(logits, context))


def kept(policy, logits, context=None):
    return np.asarray(run(policy, logits, context)) > -np.inf


@pytest.mark.parametrize("implementation", [None, "sort", "bisect"])
@pytest.mark.parametrize(
    ("name", "stage", "number"),
    [
        ("topk_5", TopK, 5),
        ("topp_0p9", TopP, 0.9),
        ("topp_0p3", TopP, 0.3),
        ("typical_0p8", Typical, 0.8),
        ("minp_0p1", MinP, 0.1),
        ("temp_0p7", Temperature, 0.7),
    ],
)
def test_published_numbers(name, stage, number, implementation):
    settings = {} if stage in (MinP, Temperature) else {"implementation": implementation}
    found, expected = np.asarray(stage(number, **settings)(LOGITS)), GOLDEN[name]
    if stage is TopP and implementation == "bisect":
        # A threshold keeps all that tie with the last.
        values = GOLDEN["logits"][TIED]
        least = values[np.isfinite(expected[TIED])].min()
        expected = expected.copy()
        expected[TIED] = np.where(values >= least, values, -np.inf)
    np.testing.assert_allclose(found, expected, atol=1e-5)


class TestSelection:
    @pytest.mark.parametrize("size", [1, 33, 1111])
    @pytest.mark.parametrize("step", [None, 0.5])
    def test_sort_and_bisection_agree_but_for_ties_at_the_edge(self, size, step):
        """Random rows, and rows of few different values (as bfloat16 makes them)."""
        rng = np.random.default_rng(size)
        logits = (4 * rng.normal(size=(24, size))).astype(np.float32)
        if step:
            logits = np.round(logits / step) * step
        logits[5, size // 2 :] = -np.inf
        logits[6] = -np.inf
        logits[7] = -0.0
        shares = rng.choice([1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 2**-23], 24).astype(np.float32)
        ks = rng.integers(1, size + 2, 24)
        for stage, numbers in ((TopP, shares), (Typical, shares), (TopK, ks)):
            a, b = (kept(stage(numbers, i), logits) for i in ("sort", "bisect"))
            assert not (a & ~b).any()
            if stage is TopK or (step is None and stage is TopP):
                rows = np.arange(24) != 7  # All of it ties.
                np.testing.assert_array_equal(a[rows | (stage is TopK)], b[rows | (stage is TopK)])
            # What only the threshold keeps ties with something that the sort keeps.
            keys = logits if stage is not Typical else np.asarray(distances(logits))
            for row in np.flatnonzero((b & ~a).any(axis=1)):
                spare = np.unique(keys[row][b[row] & ~a[row]])
                assert len(spare) == 1 and spare[0] in keys[row][a[row]]

    def test_they_agree_on_a_large_vocabulary(self):
        """Where thousands of tokens have masses below a float's rounding of the sum."""
        size = 151_936
        rng = np.random.default_rng(0)
        scale = np.array([[0.1], [1.0], [3.0], [10.0]])
        logits = (scale * rng.normal(size=(4, size))).astype(np.float32)
        for share in (0.5, 0.9, 0.999, 0.999999):
            a, b = (kept(TopP(share, i), logits) for i in ("sort", "bisect"))
            for row in range(4):
                values = logits[row]
                edge = values[a[row]].min()
                np.testing.assert_array_equal(a[row] | (values == edge), b[row] | (values == edge))
                # And both are right up to float32's rounding of the probabilities.
                p = np.exp(values.astype(np.float64))
                p /= p.sum()
                assert p[b[row]].sum() > share - 1e-6
                assert p[values > edge].sum() < share + 1e-6

    def test_any_float_can_be_the_kth(self):
        """Zeros of both signs, subnormals, infinities: a bisection of their bits ends on each."""
        values = np.array([-np.inf, -3e38, -1.0, -0.0, 0.0, 1e-20, 2.0, 3e38, np.inf], np.float32)
        keys = jnp.asarray(np.tile(values[[3, 8, 1, 6, 0, 5, 2, 7, 4]], (9, 1)))
        ks = jnp.arange(1, 10)
        for implementation in ("sort", "bisect"):
            found = kth_largest(keys, ks, implementation, None)
            np.testing.assert_array_equal(found, values[::-1])

    def test_a_mass_that_only_rounding_keeps_from_its_target_is_reached(self):
        """Three tokens of 0.1 are 0.3, which in float32 they are not."""
        weights = jnp.array([[0.1] * 10])
        for implementation in ("sort", "bisect"):
            ranks = jnp.arange(10.0)[None]
            mask = smallest_set(ranks, weights, jnp.array([0.3]), implementation)
            assert mask.sum() == 3
        assert smallest_set(weights, weights, jnp.array([0.7]), "sort").sum() == 7
        assert smallest_set(weights, weights, jnp.array([0.7]), "bisect").sum() == 10

    def test_sums_do_not_depend_on_their_order(self):
        rng = np.random.default_rng(0)
        spread = np.exp(np.linspace(-12, 9, 5003)).astype(np.float32)
        weights = np.stack([rng.permutation(spread) for _ in range(2)])
        order = rng.permutation(5003)
        turned = weights[:, order]
        np.testing.assert_array_equal(total(weights), total(turned))
        np.testing.assert_allclose(total(weights)[:, 0], weights.sum(1, dtype=np.float64), 1e-6)
        reached = np.asarray(mass_reached(weights))
        np.testing.assert_array_equal(reached[:, order], mass_reached(turned))
        rank = np.argsort(-weights, axis=1, kind="stable")
        ranked = np.take_along_axis(weights, rank, 1).astype(np.float64)
        expected = np.cumsum(ranked, axis=1) / ranked.sum(1, keepdims=True)
        np.testing.assert_allclose(np.take_along_axis(reached, rank, 1), expected, rtol=1e-6)

    def test_a_bound_on_k_changes_nothing(self):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 300)), jnp.float32)
        policies = [TopK(5, "sort"), TopK(64, "sort"), TopK(0, "sort")]
        stacked = stack_rows(policies)
        assert stacked.bound == 64
        expected = np.concatenate([policy(logits[i : i + 1]) for i, policy in enumerate(policies)])
        np.testing.assert_array_equal(stacked(logits), expected)

    @pytest.mark.parametrize("implementation", ["sort", "bisect", None])
    def test_a_whole_k_of_any_type_and_size(self, implementation):
        """A float counts as the integer that it is; more than an int32 holds is all there is."""
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)), jnp.float32)
        ks = [5.0, 2**32 + 1, 3, np.int64(2**31)]
        stacked = stack_rows([TopK(k, implementation) for k in ks])
        mask = kept(stacked, logits)
        np.testing.assert_array_equal(mask.sum(axis=1), [5, 300, 3, 300])
        np.testing.assert_array_equal(mask[0], kept(TopK(5), logits)[0])
        np.testing.assert_array_equal(kept(TopK(5.0, implementation), logits).sum(axis=1), 5)
        alone = stack_rows([TopK(2**32 + 1, implementation)])
        assert kept(alone, logits[:1]).all()


@jax.jit
def distances(logits):
    """What typical sampling ranks by."""
    return _distances(logits, _relative(logits))


@pytest.mark.parametrize("size", [1, 191])
@pytest.mark.parametrize("implementation", ["sort", "bisect"])
def test_equals_its_definition(size, implementation):
    """Random rows without ties, against float64."""
    rng = np.random.default_rng(size)
    logits = (2.5 * rng.normal(size=(16, size))).astype(np.float32)
    stages = [
        *(TopK(k, implementation) for k in (0, 1, 3, size, 400)),
        *(TopP(p, implementation) for p in (1e-6, 0.2, 0.77, 0.99, 1.0)),
        *(Typical(m, implementation) for m in (1e-6, 0.2, 0.77, 0.99, 1.0)),
        *(MinP(p) for p in (0.0, 0.03, 0.5, 1.0)),
    ]
    for stage in stages:
        expected = np.array([oracle(stage, row, None) for row in logits])
        np.testing.assert_array_equal(run(stage, logits), expected)


def test_typical_keeps_what_is_as_surprising_as_the_whole():
    """A dominant token is far from the entropy, and goes first."""
    logits = jnp.log(jnp.array([[0.4] + [0.05] * 12]))
    np.testing.assert_array_equal(kept(Typical(0.28), logits)[0], [0] + [1] * 6 + [0] * 6)


@pytest.mark.parametrize("sharpness", [30.0, 1e4, 1e6])
def test_a_sharp_soft_edge_leaves_the_likeliest(sharpness):
    """Damped by less than the smallest float32, every token still has its place."""
    logits = jnp.asarray(0.3 * np.random.default_rng(0).normal(size=(8, 96)), jnp.float32)
    damped = np.asarray(run(SoftTopP(1e-6, sharpness), logits))
    assert np.isfinite(damped).all()
    np.testing.assert_array_equal(np.argsort(-damped), np.argsort(-logits))


def test_rows_without_a_token_stay_so():
    nothing = jnp.full((2, 40), -jnp.inf)
    stages = [TopK(3), TopP(0.5), SoftTopP(0.5), MinP(0.5), Typical(0.5), Predicted()]
    stages += [kind(0.5, "bisect") for kind in (TopP, Typical)] + [TopK(3, "bisect")]
    stages += [Predicted(soft=True), Predicted(implementation="bisect")]
    context = Context(None, None, None, None, (jnp.ones(2), jnp.full((2,), 0.5)))
    for stage in stages:
        np.testing.assert_array_equal(run(stage, nothing, context), nothing)


class TestPredicted:
    temperature = jnp.array([0.4, 1.0, 1.7])
    top_p = jnp.array([0.2, 0.6, 0.95])
    context = Context(None, None, None, None, (temperature, top_p))
    logits = jnp.asarray(3 * np.random.default_rng(0).normal(size=(3, 60)), jnp.float32)

    @pytest.mark.parametrize("implementation", ["sort", "bisect"])
    def test_hard_is_the_layers_hard_rule(self, implementation):
        found = Predicted(implementation=implementation)(self.logits, self.context)
        keep = hard_top_p(self.logits, self.temperature, self.top_p)
        cooled = self.logits / self.temperature[:, None]
        np.testing.assert_array_equal(found, jnp.where(keep, cooled, -jnp.inf))

    def test_soft_is_the_layers_soft_rule(self):
        found = jax.nn.softmax(Predicted(soft=True)(self.logits, self.context))
        expected = soft_top_p(self.logits, self.temperature, self.top_p)
        # What training adds to the normaliser is not a share of any token.
        expected = expected / expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        chained = Chain(Temperature(self.temperature), SoftTopP(self.top_p))(self.logits)
        np.testing.assert_allclose(jax.nn.softmax(chained), expected, atol=1e-6)

    def test_extremes(self):
        """Temperature 0 is greedy; top-p 0 keeps one token, 1 keeps all."""
        ends = Context(None, None, None, None, (jnp.array([0.0, 1, 1]), jnp.array([0.5, 0, 1])))
        mask = kept(Predicted(), self.logits, ends)
        np.testing.assert_array_equal(mask.sum(1), [1, 1, 60])
        np.testing.assert_array_equal(mask[:2].argmax(1), self.logits[:2].argmax(1))

    def test_a_model_without_heads(self):
        with pytest.raises(InputError, match="Predicted needs decoding heads"):
            Predicted()(self.logits, Context(None, None, None))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Temperature(None), "temperature=None must be 0"),
        (lambda: Temperature("0.7"), "temperature='0.7' must be 0"),
        (lambda: Temperature(1j), "temperature=1j must be 0"),
        (lambda: Temperature(np.array(["a"])), r"temperature=\['a'\] must be 0"),
        (lambda: TopK(None), "top_k=None must be a whole number"),
        (lambda: TopP("x"), "top_p='x' must be above 0"),
        (lambda: SoftTopP(0.5, None), "sharpness=None must be a positive number"),
        (lambda: MinP(None), "min_p=None must be between 0"),
        (lambda: Typical("x"), "typical='x' must be above 0"),
        (lambda: TopK(-2), "top_k=-2 must be a whole number"),
        (lambda: TopK(2.5), "top_k=2.5"),
        (lambda: TopK(9, "sort", bound=8), "top_k=9 exceeds bound=8"),
        (lambda: TopK(9, "quick"), "implementation='quick' is not one of"),
        (lambda: TopP(0.0), "top_p=0.0 must be above 0"),
        (lambda: TopP(1.5), "top_p=1.5"),
        (lambda: TopP(float("nan")), "top_p=nan"),
        (lambda: TopP(np.array([0.5, -1])), r"top_p=\[ 0.5 -1. \]"),
        (lambda: TopP(0.5, "bisection"), "TopP: implementation='bisection'"),
        (lambda: SoftTopP(0), "soft_top_p=0"),
        (lambda: SoftTopP(0.5, 0), "sharpness=0 must be a positive number"),
        (lambda: MinP(-0.1), "min_p=-0.1 must be between 0"),
        (lambda: MinP(1.1), "min_p=1.1"),
        (lambda: Typical(0), "typical=0 must be above 0"),
        (lambda: Typical(2, "sort"), "typical=2"),
        (lambda: Predicted(implementation="x"), "Predicted: implementation='x'"),
    ],
)
def test_bad_numbers_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()
