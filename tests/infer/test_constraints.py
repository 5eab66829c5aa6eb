"""Constraints: against plain loops on random rows, the published mask, and their limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stages import GOLDENS, context, oracle, rows, words_of
from toys import TableConfig, table_model

import jaxalope
from jaxalope import BadWords, Chain, GrammarMask, Greedy, InputError, LogitBias, MinNewTokens
from jaxalope.infer.policy import Context, propose, stack_rows

GOLDEN = np.load(GOLDENS)

run = jax.jit(lambda policy, *args: policy(*args))


def equals_oracle(policies, vocab_size, rng):
    made = rows(rng, len(policies), vocab_size)
    logits = rng.normal(size=(len(policies), vocab_size)).astype(np.float32)
    found = run(stack_rows(policies), logits, context(made, vocab_size))
    each = zip(policies, logits, made, strict=True)
    expected = np.array([oracle(policy, row, text) for policy, row, text in each])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    return expected


def test_published_mask():
    """40 tokens are two words; 24 bits of the second stand for no token."""
    for words in (GOLDEN["grammar_words_int32"], GOLDEN["grammar_words_int32"].view(np.uint32)):
        found = GrammarMask(words)(jnp.zeros((6, 40)))
        np.testing.assert_array_equal(np.asarray(found) == 0, GOLDEN["grammar_allow"])


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 95])
def test_mask_of_any_vocabulary(vocab_size):
    rng = np.random.default_rng(vocab_size)
    allowed = rng.random((7, vocab_size)) < 0.5
    logits = jnp.asarray(rng.normal(size=(7, vocab_size)), jnp.float32)
    policy = stack_rows([GrammarMask(words_of(row)) for row in allowed])
    assert policy.words.shape == (7, -(-vocab_size // 32))
    np.testing.assert_array_equal(policy(logits), np.where(allowed, logits, -np.inf))
    unsigned = stack_rows([GrammarMask(words_of(row).view(np.uint32)) for row in allowed])
    np.testing.assert_array_equal(unsigned.words, policy.words)
    # Minus one is a word of 32 tokens; what no word speaks of is forbidden.
    first = np.arange(vocab_size) < 32
    np.testing.assert_array_equal(
        GrammarMask(np.array([-1], np.int32))(logits), np.where(first, logits, -np.inf)
    )


def test_a_starved_row_keeps_the_best_token_that_its_grammar_allows():
    logits = jnp.array([[5.0, 4.0, 3.0, 2.0]] * 3)
    words = np.array([[0b1100], [0b0000], [0b0110]], np.int32)
    forbid = LogitBias(dict.fromkeys((1, 2, 3), -np.inf))
    proposal, starved = propose(Chain(forbid, GrammarMask(words)), logits, None)
    np.testing.assert_array_equal(starved, [True, True, True])
    np.testing.assert_array_equal(jnp.argmax(proposal, axis=1), [2, 0, 1])
    assert not jnp.isnan(proposal).any()


def test_bias_equals_its_definition():
    rng = np.random.default_rng(0)
    biases = [
        {int(v): float(rng.normal()) for v in rng.choice(23, count, replace=False)}
        for count in (1, 4, 0, 23, 2)
    ]
    equals_oracle([LogitBias(bias) for bias in biases], 23, rng)


def test_bad_words_equal_their_definition():
    """Words of one to five tokens, taken from the rows so that many have begun."""
    rng = np.random.default_rng(1)
    made = rows(np.random.default_rng(1), 40, 29)
    policies = []
    for row in made:
        words = []
        for _ in range(rng.integers(1, 6)):
            length = min(int(rng.integers(1, 6)), len(row.text) + 1)
            begun = row.text[len(row.text) - length + 1 :]
            if rng.random() < 0.3:
                begun = [int(v) for v in rng.integers(0, 29, length - 1)]
            words.append([*begun, int(rng.integers(29))])
        policies.append(BadWords(words))
    expected = equals_oracle(policies, 29, np.random.default_rng(1))
    assert 20 < np.isinf(expected).sum() < 200


def test_a_bad_word_longer_than_the_row_has_not_begun():
    """What lies before a row's start is no token, not even the canvas's first."""
    row = Context(jnp.array([[7, 7, 0, 0]]), jnp.array([2]), jnp.array([1]))
    found = BadWords([[7, 7, 7, 5], [7, 7, 4]])(jnp.zeros((1, 9)), row)
    np.testing.assert_array_equal(np.flatnonzero(np.isinf(found)), [4])


def test_min_new_tokens_equals_its_definition():
    rng = np.random.default_rng(2)
    policies = [
        MinNewTokens(int(rng.integers(12)), rng.choice(19, rng.integers(0, 5)).tolist())
        for _ in range(30)
    ]
    expected = equals_oracle(policies, 19, rng)
    assert np.isinf(expected).any(axis=1).sum() > 5
    single = MinNewTokens(2, 3)(jnp.zeros((1, 5)), Context(None, jnp.array([2]), jnp.array([1])))
    np.testing.assert_array_equal(np.isinf(single)[0], np.arange(5) == 3)


def test_a_token_that_the_vocabulary_does_not_have(model):
    for policy, words in (
        (LogitBias({3: 1.0, 999: 1.0}), "logit_bias has token id 999"),
        (Chain(BadWords([[1, 2], [500, 1]]), Greedy()), "bad_words has token id 500"),
        (MinNewTokens(1, [39, 40]), "stop_tokens has token id 40"),
    ):
        with pytest.raises(InputError, match=f"{words}, outside the model's vocabulary"):
            jaxalope.generate(model, [[1]], policy, 1)
        policy.check_vocabulary(1000)


@pytest.fixture(scope="module")
def model():
    return table_model(TableConfig(vocab_size=40, order=1))


def test_generation_obeys_all_of_them(model):
    """A chain in one loop with other rows: its constraints hold of the whole text it drew."""
    stop = 9
    allowed = np.arange(40) < 13
    chain = Chain(
        LogitBias({3: 1.0, stop: 3.0}),
        BadWords([[5], [3, 4]]),
        GrammarMask(words_of(allowed)),
        MinNewTokens(6, [stop]),
        jaxalope.RepetitionPenalty(1.2),
        jaxalope.PresenceFrequencyPenalty(0.1, 0.1),
        jaxalope.NoRepeatNgram(2),
        jaxalope.Temperature(1.5),
    )
    policies = [chain, jaxalope.Temperature(1.0), GrammarMask(words_of(~allowed)), chain]
    prompts = [[1, 2], [1], [3], [4, 4, 1, 3]]
    out = jaxalope.generate(model, prompts, policies, 30, [5, 6, 7, 8], stop_tokens=[stop])
    for i in (0, 3):
        new = out.tokens[i].tolist()
        pairs = list(itertools.pairwise([*prompts[i], *new]))
        assert max(new) < 13 and 5 not in new and (3, 4) not in pairs
        assert len(set(pairs)) == len(pairs)
        assert stop not in new[:6] and out.finish_reasons[i] == "stop"
        alone = jaxalope.generate(model, [prompts[i]], chain, 30, [5 + i], stop_tokens=[stop])
        np.testing.assert_array_equal(alone.tokens[0], new)
    assert out.tokens[2].min() >= 13 and not any(out.starved)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogitBias({-1: 1.0}), "logit_bias=.* must be a list of token ids"),
        (lambda: LogitBias({1.5: 1.0}), "logit_bias="),
        (lambda: LogitBias({1: float("nan")}), "logit_bias=.* must be finite, or -inf"),
        (lambda: LogitBias({1: float("inf")}), "logit_bias="),
        (lambda: LogitBias({1: None}), "logit_bias="),
        (lambda: LogitBias({1: "x"}), "logit_bias={1: 'x'} must map ids to numbers"),
        (lambda: LogitBias([1, 2]), "logit_bias has ids without values"),
        (lambda: BadWords([[1], []]), "bad_words=.* has an empty sequence"),
        (lambda: BadWords([[1, -2]]), "bad_words="),
        (lambda: BadWords([["a"]]), "bad_words="),
        (lambda: MinNewTokens(-1, [2]), "min_new_tokens=-1 must be a whole number"),
        (lambda: MinNewTokens(1.5, [2]), "min_new_tokens=1.5"),
        (lambda: MinNewTokens(None, [2]), "min_new_tokens=None"),
        (lambda: MinNewTokens(1, [-3]), "stop_tokens="),
        (lambda: MinNewTokens(1, None), "stop_tokens=None must be a list of token ids"),
        (lambda: GrammarMask(np.ones(2, bool)), "grammar words of dtype bool must be int32"),
    ],
)
def test_bad_values_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()
