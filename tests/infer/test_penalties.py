"""Penalties against float64 on random rows, and the published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stages import GOLDENS, context, oracle, rows

from jaxalope import InputError, NoRepeatNgram, PresenceFrequencyPenalty, RepetitionPenalty
from jaxalope.infer.policy import Context, Counts, stack_rows

GOLDEN = np.load(GOLDENS)


def golden_context():
    """The goldens' histories, all of it output; canvases go on with tokens that do not count."""
    history = GOLDEN["history"]
    counts = np.zeros((6, 40), np.int32)
    for row, ids in zip(counts, history, strict=True):
        np.add.at(row, ids, 1)
    tokens = jnp.asarray(np.concatenate([history, history[:, ::-1]], axis=1), jnp.int32)
    return Context(
        tokens=tokens,
        length=jnp.full((6,), history.shape[1]),
        prompt_length=jnp.zeros((6,), jnp.int32),
        counts=Counts(jnp.zeros((6, 40), jnp.int32), jnp.asarray(counts)),
    )


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("rep_1p3", RepetitionPenalty(1.3)),
        ("presfreq_0p4_0p2", PresenceFrequencyPenalty(0.4, 0.2)),
        ("ngram_3", NoRepeatNgram(3)),
        ("ngram_2", NoRepeatNgram(2)),
    ],
)
def test_published_numbers(name, stage):
    found = stage(jnp.asarray(GOLDEN["logits"], jnp.float32), golden_context())
    np.testing.assert_allclose(found, GOLDEN[name], atol=1e-5)


@pytest.mark.parametrize("vocab_size", [3, 41])
def test_no_repeat_ngram_equals_its_definition(vocab_size):
    """Every size from 1 to beyond the longest row, one a row."""
    rng = np.random.default_rng(vocab_size)
    made = rows(rng, 60, vocab_size)
    sizes = [int(n) for n in rng.integers(1, 27, 60)]
    policy = stack_rows([NoRepeatNgram(n) for n in sizes])
    logits = rng.normal(size=(60, vocab_size)).astype(np.float32)
    run = jax.jit(lambda policy, *args: policy(*args))
    found = run(policy, logits, context(made, vocab_size))
    each = zip(sizes, logits, made, strict=True)
    expected = [oracle(NoRepeatNgram(n), row, text) for n, row, text in each]
    np.testing.assert_array_equal(found, np.array(expected))
    assert np.isinf(expected).any() and len({n for n in sizes if n > 20})


def test_size_one_forbids_every_token_of_the_row():
    logits = jnp.zeros((1, 6))
    tokens = jnp.array([[1, 4, 1, 2, 3]])
    found = NoRepeatNgram(1)(logits, Context(tokens, jnp.array([3]), jnp.array([1])))
    np.testing.assert_array_equal(np.isinf(found), [[0, 1, 0, 0, 1, 0]])


def test_a_traced_size_needs_its_longest():
    logits, tokens = jnp.zeros((1, 6)), jnp.array([[1, 2, 3, 1, 2, 0]])
    row = Context(tokens, jnp.array([5]), jnp.array([1]))
    with pytest.raises(InputError, match="no_repeat_ngram is traced; say longest="):
        jax.jit(lambda n: NoRepeatNgram(n)(logits, row))(3)
    found = jax.jit(lambda n: NoRepeatNgram(n, longest=3)(logits, row))(3)
    np.testing.assert_array_equal(np.isinf(found), [[0, 0, 0, 1, 0, 0]])


def test_the_prompt_counts_where_it_is_said_to():
    prompt, output = jnp.array([[2, 0, 1]]), jnp.array([[0, 0, 3]])
    row = Context(None, None, None, Counts(prompt, output))
    logits = jnp.array([[1.0, 1.0, -1.0]])
    repetition = RepetitionPenalty(2.0)(logits, row)
    np.testing.assert_allclose(repetition, [[0.5, 1.0, -2.0]])
    for include, expected in ((False, [[1.0, 1.0, -2.3]]), (True, [[0.1, 1.0, -2.7]])):
        found = PresenceFrequencyPenalty(0.1, 0.4, include)(logits, row)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RepetitionPenalty(0), "repetition_penalty=0 must be a positive number"),
        (lambda: RepetitionPenalty(-1.0), "repetition_penalty=-1.0"),
        (lambda: RepetitionPenalty(float("inf")), "repetition_penalty=inf"),
        (lambda: PresenceFrequencyPenalty(float("nan")), "presence_penalty=nan must be a finite"),
        (lambda: PresenceFrequencyPenalty(0.0, float("inf")), "frequency_penalty=inf"),
        (lambda: RepetitionPenalty("x"), "repetition_penalty='x' must be a positive number"),
        (lambda: PresenceFrequencyPenalty(None), "presence_penalty=None must be a finite"),
        (lambda: NoRepeatNgram(None), "no_repeat_ngram=None must be a whole number"),
        (lambda: NoRepeatNgram(0), "no_repeat_ngram=0 must be a whole number"),
        (lambda: NoRepeatNgram(1.5), "no_repeat_ngram=1.5"),
        (lambda: NoRepeatNgram(np.array([3, 0])), r"no_repeat_ngram=\[3 0\]"),
        (lambda: NoRepeatNgram(5, longest=4), "no_repeat_ngram=5 exceeds longest=4"),
    ],
)
def test_bad_numbers_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()
