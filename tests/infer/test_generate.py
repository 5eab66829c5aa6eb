"""Generation equals what the forward pass says, whatever the batch, bucket or step count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import hybrid_model

import jaxalope
from jaxalope import (
    Chain,
    DraftModel,
    ExactTemperature,
    Greedy,
    InputError,
    Predicted,
    Temperature,
)
from jaxalope.infer import NextToken
from jaxalope.infer.driver import decoder_of
from jaxalope.infer.request import make_batch
from jaxalope.model import KimiLinearConfig
from jaxalope.sharding import MeshConfig, make_mesh

TINY = KimiLinearConfig.tiny()
PROMPTS = ["def f(x):", "i", "class Jackalope: has antlers"]


@pytest.fixture(scope="module")
def model():
    return hybrid_model(TINY)


def row(model, prompt):
    return model.tokenizer.encode(prompt)


def full_logits(model, prompt, new):
    """Logits before each of the new tokens, from one uncached forward pass."""
    ids = np.array([[*row(model, prompt), *new]], np.int32)
    return np.asarray(model(ids)[0][0, -len(new) - 1 : -1])


def test_greedy_equals_the_forward_pass(model):
    out = jaxalope.generate(model, PROMPTS, Greedy(), max_new_tokens=12)
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        logits = full_logits(model, prompt, tokens.tolist())
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
        expected = jax.nn.log_softmax(logits)[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_batched_equals_single(model):
    policy = Temperature(0.9)
    together = jaxalope.generate(model, PROMPTS, policy, 20, seed=[5, 6, 7])
    for i, prompt in enumerate(PROMPTS):
        alone = jaxalope.generate(model, prompt, policy, 20, seed=[5 + i])
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        assert together.text[i] == alone.text[0]
    turned = jaxalope.generate(model, PROMPTS[::-1], policy, 20, seed=[7, 6, 5])
    assert turned.text == together.text[::-1]


def test_seeds_matter(model):
    texts = {jaxalope.generate(model, "x", Temperature(1.0), 20, seed=s).text[0] for s in range(4)}
    assert len(texts) == 4


def test_begin_token(model):
    """An empty prompt begins with it; others do where training did so."""
    tokens = [model.tokenizer.bos_id]
    expected = jaxalope.generate(model, [tokens], Greedy(), 4)
    assert jaxalope.generate(model, "", Greedy(), 4).text == expected.text
    begun = dataclasses.replace(model, add_bos=True)
    expected = jaxalope.generate(model, [[*tokens, *b"ab"]], Greedy(), 4)
    assert jaxalope.generate(begun, "ab", Greedy(), 4).text == expected.text


def test_stop_token_ends_its_row_only(model):
    free = jaxalope.generate(model, PROMPTS, Temperature(1.0), 24, stop_tokens=())
    assert free.finish_reasons == ["length"] * 3
    stop = int(free.tokens[1][5])
    out = jaxalope.generate(model, PROMPTS, Temperature(1.0), 24, stop_tokens=(stop,))
    for i, tokens in enumerate(free.tokens):
        first = np.flatnonzero(tokens == stop)
        if len(first):
            assert out.finish_reasons[i] == "stop"
            np.testing.assert_array_equal(out.tokens[i], tokens[: first[0] + 1])
            assert len(out.logprobs[i]) == first[0] + 1
        else:
            assert out.finish_reasons[i] == "length"
            np.testing.assert_array_equal(out.tokens[i], tokens)
    assert out.finish_reasons[1] == "stop"


def test_interrupted_loop_equals_one_call(model):
    decoder, policy = NextToken(model.graphdef), Temperature(1.0)
    prompts = np.array([[1, 2, 3, 0], [4, 5, 6, 7]], np.int32)
    lengths = np.array([3, 4], np.int32)
    stops, seeds = np.array([[-1], [-1]], np.int32), np.array([0, 1], np.uint32)

    def start():
        rows = (prompts, lengths, lengths + 10, seeds, np.zeros(2, np.int32))
        return decoder.prefill(model.params, *rows, capacity=16)

    whole = decoder.decode(model.params, policy, start(), stops, jnp.int32(10))
    state, calls = start(), 0
    while not bool(state.done.all()):
        state = decoder.decode(model.params, policy, state, stops, jnp.int32(3))
        calls += 1
    assert calls == 4
    np.testing.assert_array_equal(state.tokens, whole.tokens)
    np.testing.assert_array_equal(state.records["logprob"], whole.records["logprob"])


def test_one_compilation_a_bucket(model):
    model = dataclasses.replace(model)  # Another handle has compiled nothing yet.
    for prompt in ("a", "ab", "abc" * 15):
        jaxalope.generate(model, prompt, Temperature(0.31), 5)
    for max_new_tokens in (6, 9):
        jaxalope.generate(model, "a", Temperature(0.7), max_new_tokens)
    decoder = decoder_of(model)
    assert decoder.prefill._cache_size() == 1
    assert decoder.decode._cache_size() == 1


def test_samples_follow_the_distribution(model):
    """Pearson's chi-square of 4000 draws of one token; the false-alarm rate is below 1e-4."""
    count, temperature = 4000, 0.8
    out = jaxalope.generate(model, ["ab"] * count, Temperature(temperature), 1, seed=11)
    drawn = np.bincount([int(t[0]) for t in out.tokens], minlength=TINY.vocab_size)
    logits = np.asarray(model(np.array([row(model, "ab")], np.int32))[0][0, -1])
    expected = count * np.asarray(jax.nn.softmax(logits / temperature))
    likely = expected >= 5
    observed = np.append(drawn[likely], drawn[~likely].sum())
    expected = np.append(expected[likely], expected[~likely].sum())
    statistic = np.sum((observed - expected) ** 2 / expected)
    freedom = len(observed) - 1
    # Wilson and Hilferty's normal approximation of the chi-square quantile, at z = 3.8.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.8 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def test_sharded_equals_one_device(model):
    sharded = model.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    # Three prompts over four shares of the batch.
    expected = jaxalope.generate(model, PROMPTS, Greedy(), 8)
    found = jaxalope.generate(sharded, PROMPTS, Greedy(), 8)
    assert found.finish_reasons == expected.finish_reasons
    for a, b in zip(found.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(a, b)


def test_seeds_are_modulo_two_to_the_32nd(model):
    def tokens(seed):
        return [t.tolist() for t in jaxalope.generate(model, ["a", "b"], None, 4, seed=seed).tokens]

    assert tokens(np.int64(2**40 + 3)) == tokens(3) == tokens([3, 2**32 + 4])
    assert tokens(-1) == tokens(2**32 - 1)


def test_few_numbers_of_stop_tokens_are_compiled(model):
    batches = [make_batch(model, "a", None, 4, 0, list(range(n))).stop_tokens for n in range(9)]
    assert [b.shape[1] for b in batches] == [1, 1, 2, 4, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("policy", [Greedy(), Temperature(0.0)])
def test_a_greedy_row_of_which_everything_is_forbidden_starves(policy):
    logits = jnp.full((2, 5), -jnp.inf).at[1, 3].set(0.0)
    np.testing.assert_array_equal(policy(logits), logits)


def test_chain_applies_in_order():
    logits = jnp.array([[0.0, 1.0, 3.0]])
    chained = Chain(Temperature(0.5), Temperature(4.0))(logits)
    np.testing.assert_allclose(chained, logits / 2)
    assert hash(Chain(Greedy())) == hash(Chain(Greedy()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[]]}, r"prompts\[0\] is empty"),
        ({"prompts": [97, 98]}, r"prompts\[0\]=97 is a token id and no prompt; .* \[\[...\]\]"),
        ({"prompts": np.array([97, 98])}, r"prompts\[0\]=97 is a token id"),
        ({"prompts": ["a", None]}, r"prompts\[1\]=None must be a text, or a list"),
        ({"prompts": None}, "prompts=None must be a text, or a sequence"),
        ({"prompts": "a", "max_new_tokens": 3.0}, "max_new_tokens=3.0 must be a whole number"),
        ({"prompts": "a", "max_new_tokens": [2.5]}, r"max_new_tokens\[0\]=2.5 must be a whole"),
        ({"prompts": "a", "seed": None}, "seed=None must be a whole number"),
        ({"prompts": "a", "max_length": 9.5}, "max_length=9.5 must be a whole number"),
        ({"prompts": [[1, 999]]}, "token id 999"),
        ({"prompts": "a", "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompts": ["a", "b"], "seed": [1]}, "seed has 1 entries for 2 prompts"),
        ({"prompts": "a", "policy": Predicted()}, "Predicted, which reads decoding heads"),
        ({"prompts": "a", "policy": ExactTemperature(0.5)}, "ExactTemperature, which is for"),
        (
            {"prompts": "a", "draft": DraftModel(hybrid_model(), Predicted())},
            "Predicted, which reads decoding heads",
        ),
    ],
)
def test_bad_input_is_named(model, arguments, words):
    with pytest.raises(InputError, match=words):
        jaxalope.generate(model, **arguments)


def test_whole_numbers_of_numpy_are_numbers(model):
    prompts = ["a", "bc"]
    plain = jaxalope.generate(model, prompts, None, 3, 7, stop_tokens=[258])
    for kind in (np.int64, np.array):
        settings = {"stop_tokens": kind(258), "max_length": kind(40), "n": kind(1)}
        out = jaxalope.generate(model, prompts, None, kind(3), kind(7), **settings)
        for a, b in zip(out.tokens, plain.tokens, strict=True):
            np.testing.assert_array_equal(a, b)
    token = int(plain.tokens[0][0])
    stopped = jaxalope.generate(model, prompts, None, 3, 7, stop_tokens=token)
    assert stopped.finish_reasons[0] == "stop" and len(stopped.tokens[0]) == 1


def test_temperature_must_be_positive():
    with pytest.raises(InputError, match=r"temperature=-1"):
        Temperature(-1)
