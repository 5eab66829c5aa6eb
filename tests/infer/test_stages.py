"""What holds of every stage: its definition, its neutral form, rows that share a batch, a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from stages import GOLDENS, context, every_stage, examples, oracle, rows, take

from jaxalope import (
    BadWords,
    Chain,
    GrammarMask,
    Greedy,
    InputError,
    LogitBias,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    Predicted,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from jaxalope.infer.next_token import draw
from jaxalope.infer.policy import Context, Counts, propose, stack_rows
from jaxalope.sharding import MeshConfig, constrain, make_mesh, use_mesh

V = 67
PAIRS = examples(V, np.random.default_rng(1))
NAMES = [f"{type(a).__name__}-{getattr(a, 'implementation', None)}" for a, _ in PAIRS]

proposal_of = jax.jit(lambda policy, logits, context: policy(logits, context))


@pytest.fixture(scope="module")
def batch():
    """Eight rows: ``(rows, context, logits)``; in two of them something is forbidden already."""
    rng = np.random.default_rng(2)
    made = rows(rng, 8, V)
    logits = (3 * rng.normal(size=(8, V))).astype(np.float32)
    logits[3, ::3] = -np.inf
    logits[6, 5:] = -np.inf
    return made, context(made, V), jnp.asarray(logits)


def same_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_equals_its_definition(pair, batch):
    made, context, logits = batch
    mixed = stack_rows([pair[i % 2] for i in range(8)])
    found = np.asarray(proposal_of(mixed, logits, context))
    for i, row in enumerate(made):
        expected = oracle(pair[i % 2], np.asarray(logits[i]), row)
        # Soft masks are compared as the distributions that they are.
        shift = np.max(expected) - np.max(found[i])
        assert np.array_equal(found[i] > -np.inf, expected > -np.inf)
        np.testing.assert_allclose(found[i] + shift, expected, atol=2e-5)
        if "Soft" not in type(pair[0]).__name__ and not getattr(pair[0], "soft", False):
            assert abs(shift) < 1e-5


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_other_numbers_compile_once(pair, batch):
    _, context, logits = batch
    run = jax.jit(lambda policy: policy(logits, context))
    for policy in pair:
        run(policy)
    assert run._cache_size() == 1


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_neutral_form_changes_no_bit(pair, batch):
    _, context, logits = batch
    logits = logits.at[0, 0].set(-0.0)
    neutral = type(pair[0]).neutral()
    assert same_bits(neutral(logits, context), logits)
    # In a batch the neutral rows have the others' static settings.
    mixed = stack_rows([pair[0], *[neutral] * 7])
    assert same_bits(proposal_of(mixed, logits, context)[1:], logits[1:])


@pytest.mark.parametrize("last", [False, True])
def test_a_row_of_a_mixed_batch_is_bit_for_bit_itself(last, batch):
    """Rows with none, one, some and all of the stages, against each alone in a batch of one."""
    _, context, logits = batch
    whole = every_stage(V, np.random.default_rng(3), last)
    parts = whole.policies
    policies = [
        whole,
        parts[0],
        Greedy(),
        Chain(*parts[4:9]),
        Chain(*parts[::2]),
        Temperature(0.3),
        Chain(*parts[1::2]),
        parts[-1],
    ]
    mixed = proposal_of(stack_rows(policies), logits, context)
    for i, policy in enumerate(policies):
        alone = proposal_of(stack_rows([policy]), logits[i : i + 1], take(context, i))
        assert same_bits(mixed[i], alone[0]), policy
        # Numbers of no axis, for all rows, are the same again.
        if not isinstance(policy, Chain):
            assert same_bits(policy(logits[i : i + 1], take(context, i))[0], alone[0]), policy


def test_stages_share_a_batch_whatever_their_static_settings():
    """A row without the stage takes the others' implementation, widths and bounds."""
    stacked = stack_rows([TopK(3, "sort"), Greedy(), TopK(70, "sort")])
    assert [type(stage) for stage in stacked.policies] == [Temperature, TopK]
    assert stacked.policies[1].implementation == "sort"
    assert stacked.policies[1].bound == 1024
    assert stack_rows([TopK(3, "sort"), TopK(5000, "sort")]).bound is None
    assert stack_rows([NoRepeatNgram(2), NoRepeatNgram(9)]).longest == 16
    biases = LogitBias({1: 1.0}), LogitBias(dict.fromkeys(range(5), 1.0))
    assert stack_rows(biases).ids.shape == (2, 8)
    with pytest.raises(InputError, match="TopP's static settings"):
        stack_rows([TopP(0.5, "sort"), TopP(0.5, "bisect")])


@pytest.mark.parametrize(("explicit", "last"), [(True, False), (True, True), (False, True)])
def test_on_a_mesh_every_stage_is_what_it_is_alone(explicit, last, batch):
    _, context, logits = batch
    policy = stack_rows([every_stage(V, np.random.default_rng(i), last) for i in range(8)])
    expected, starved = jax.jit(propose)(policy, logits, context)

    @jax.jit
    def run(policy, logits, context):
        logits = constrain(logits, "batch", None)
        context = jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), context)
        return propose(policy, logits, context)

    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, explicit=explicit))):
        found, flags = run(policy, logits, context)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_array_equal(flags, starved)
    assert same_bits(found, expected)


FORBID_ALL = [
    LogitBias(dict.fromkeys(range(V), -np.inf)),
    BadWords([[v] for v in range(V)]),
    GrammarMask(np.zeros(3, np.int32)),
    MinNewTokens(1000, list(range(V))),
    NoRepeatNgram(1),
]


@pytest.mark.parametrize("policy", FORBID_ALL, ids=[type(p).__name__ for p in FORBID_ALL])
def test_a_starved_row_is_flagged_and_never_nan(policy, batch):
    """The likeliest token that a grammar allows is what is left; the other stages see no token."""
    _, context, logits = batch
    context = dataclasses.replace(
        context,
        tokens=jnp.tile(jnp.arange(V, dtype=jnp.int32), (8, 1)),
        length=jnp.full((8,), V, jnp.int32),
    )
    allowed = np.arange(V) % 2 == 1
    words = np.packbits(np.pad(allowed, (0, 96 - V)), bitorder="little").view(np.int32)
    rest = every_stage(V, np.random.default_rng(4)).policies
    rest = [s for s in rest if type(s) not in (type(policy), GrammarMask)]
    for chain in (policy, Chain(policy, *rest), Chain(GrammarMask(words), policy, *rest)):
        proposal, starved = propose(chain, logits, context)
        assert starved.all() and not jnp.isnan(proposal).any()
        grammar = isinstance(chain, Chain) and isinstance(chain.policies[0], GrammarMask)
        if grammar and not isinstance(policy, GrammarMask):
            left = np.where(allowed, logits, -np.inf)
            left = np.where((left > -np.inf).any(1, keepdims=True), left, logits)
        else:
            left = np.asarray(logits)
        np.testing.assert_array_equal(np.argmax(proposal, axis=1), np.argmax(left, axis=1))
        assert ((np.asarray(proposal) > -np.inf).sum(1) == 1).all()


def test_truncation_alone_never_starves(batch):
    _, context, logits = batch
    policy = Chain(TopK(1), TopP(1e-7), MinP(1.0), Typical(1e-7), RepetitionPenalty(2.0))
    assert not policy.can_starve
    assert (np.asarray(policy(logits, context)) > -np.inf).any(axis=1).all()


@pytest.mark.parametrize("value", [1e-38, 1.0, 8e37, 9e37, 3e38])
def test_no_temperature_brings_a_forbidden_token_back(value, batch):
    _, context, logits = batch
    given = jnp.full((8,), value, jnp.float32), jnp.ones(8)
    context = dataclasses.replace(context, predicted=given)
    for policy in (stack_rows([Temperature(value)] * 8), Predicted(soft=True)):
        found = np.asarray(proposal_of(policy, logits, context))
        assert not np.isnan(found).any() and not (found[logits == -np.inf] > -np.inf).any()
        if value > 1e-5:
            np.testing.assert_array_equal(found > -np.inf, logits > -np.inf)


def test_a_forbidden_token_has_no_part_in_the_gradient_of_a_temperature():
    logits = jnp.array([[1.0, -jnp.inf, 3.0, 0.5]])

    def surprise(temperature, logits):
        return -jax.nn.log_softmax(Temperature(temperature)(logits))[0, 0]

    found = jax.grad(surprise)(0.7, logits)
    np.testing.assert_allclose(found, jax.grad(surprise)(0.7, logits[:, jnp.array([0, 2, 3])]))


def test_stages_say_what_they_miss():
    logits = jnp.zeros((1, V))
    empty = Context(jnp.zeros((1, 4), jnp.int32), jnp.ones(1, jnp.int32), jnp.ones(1, jnp.int32))
    with pytest.raises(InputError, match="RepetitionPenalty needs counts"):
        RepetitionPenalty(1.2)(logits, empty)
    with pytest.raises(InputError, match="NoRepeatNgram needs the tokens before"):
        NoRepeatNgram(2)(logits)


def test_draws_follow_the_chain():
    """Pearson's chi-square of 200k draws from the published chain's exact probabilities.

    The false-alarm rate is 1e-4.
    """
    golden = np.load(GOLDENS)
    logits, history = golden["logits"], golden["history"]
    exact = golden["chain_rep1p3_temp0p7_k20_p0p9_minp0p05_probs"]
    count, turns = 3400, 10
    index = np.repeat(np.arange(6), count)
    seen = np.zeros((6, 40), np.int32)
    for row, ids in zip(seen, history, strict=True):
        np.add.at(row, ids, 1)
    counts = Counts(jnp.zeros_like(seen[index]), jnp.asarray(seen[index]))
    policy = Chain(RepetitionPenalty(1.3), Temperature(0.7), TopK(20), TopP(0.9), MinP(0.05))
    run = jax.jit(lambda *args: draw(policy, *args)[0])
    drawn = np.zeros((6, 40))
    for turn in range(turns):
        keys = jax.random.split(jax.random.key(turn), len(index))
        at = jnp.full(len(index), turn, jnp.int32)
        tokens = run(
            jnp.asarray(logits[index], jnp.float32),
            Context(jnp.zeros((len(index), 1), jnp.int32), at, at, counts),
            keys,
        )
        np.add.at(drawn, (index, np.asarray(tokens)), 1)
    kept = exact > 0
    assert drawn.sum() > 200_000 and not drawn[~kept].any()
    expected = exact * count * turns
    assert expected[kept].min() > 5
    statistic = np.sum((drawn - expected)[kept] ** 2 / expected[kept])
    assert scipy.stats.chi2.sf(statistic, kept.sum() - 6) > 1e-4
