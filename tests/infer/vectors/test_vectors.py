"""Generation by chunks is what the forward pass says, whatever the batch, cache or step count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxalope
from jaxalope import (
    BatchTemperature,
    Chain,
    ExactTemperature,
    Greedy,
    InputError,
    PromptLookup,
    Temperature,
    TopP,
    generate,
)
from jaxalope.infer import NextVector, beam_search
from jaxalope.infer.grammar import Regex
from jaxalope.infer.next_token import row_keys
from jaxalope.infer.programs import program_of
from jaxalope.model import CALMConfig, build_model
from jaxalope.model.calm_autoencoder import CALMAutoencoderConfig
from jaxalope.sharding import MeshConfig, init_params, make_mesh

pytestmark = pytest.mark.long

PROMPTS = ["abcd", "def f(x): re", "class Jackalope:"]
K = 4


@functools.partial(jax.jit, static_argnums=0)
def _slow_chunk(graphdef, params, tokens, last, key):
    module = nnx.merge(graphdef, params)
    hidden, _ = module(tokens)
    draw = jax.random.fold_in(key, 0)
    noise = module.latent_head.noise(jax.random.fold_in(draw, 0), (1, 1))
    return module.tokens(module.draw(hidden[:, last][:, None], noise))[0, 0]


def slow(model, prompt, count, seed, sample=0):
    """Temperature 1, the whole prefix read anew for every chunk."""
    key = row_keys(jnp.uint32([seed]), jnp.int32([sample]))[0]
    size, tokens = model.config.chunk_size, np.zeros((1, 96), np.int32)
    tokens[0, : len(prompt)] = list(prompt)
    for start in range(len(prompt), len(prompt) + count * size, size):
        tokens[0, start : start + size] = _slow_chunk(
            model.graphdef,
            model.params,
            tokens,
            start // size - 1,
            jax.random.fold_in(key, start),
        )
    return tokens[0, len(prompt) :][: count * size]


def same(a, b):
    for x, y in zip(a.tokens, b.tokens, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (a.text, a.finish_reasons, a.draws) == (b.text, b.finish_reasons, b.draws)
    assert a.exhausted == b.exhausted


def test_the_cache_changes_nothing(varied):
    out = generate(varied, PROMPTS, max_new_tokens=5 * K, seed=7, stop_tokens=())
    for i, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(out.tokens[i], slow(varied, prompt.encode(), 5, 7 + i))
    assert out.draws == [5] * 3 and out.exhausted == [False] * 3
    assert out.logprobs is None and out.finish_reasons == ["length"] * 3


POLICIES = {
    "one": None,
    "exact": [ExactTemperature(0.6, 300), ExactTemperature(1.0), ExactTemperature(0.5, 60)],
    "batch": [BatchTemperature(0.5, 20), BatchTemperature(1 / 3, 30), Temperature(1.0)],
}


@pytest.mark.filterwarnings("ignore:rows")
@pytest.mark.parametrize("name", POLICIES)
def test_batched_equals_single(peaked, varied, name):
    model, policies = (varied, [None] * 3) if name == "one" else (peaked, POLICIES[name])
    numbers = {"max_new_tokens": 6 * K, "stop_tokens": ()}
    together = generate(model, PROMPTS, POLICIES[name], **numbers, seed=[5, 6, 7])
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt, policies[i], **numbers, seed=[5 + i])
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        assert (together.draws[i], together.exhausted[i]) == (alone.draws[0], alone.exhausted[0])
    turned = None if name == "one" else policies[::-1]
    turned = generate(model, PROMPTS[::-1], turned, **numbers, seed=[7, 6, 5])
    assert turned.text == together.text[::-1]


def test_samples_and_seeds(varied):
    many = generate(varied, PROMPTS[:2], max_new_tokens=8, seed=3, n=3, stop_tokens=())
    assert len({t.tobytes() for t in many.tokens}) == 6
    one = generate(varied, PROMPTS[:2], max_new_tokens=8, seed=3, stop_tokens=())
    for i in range(2):
        np.testing.assert_array_equal(many.tokens[3 * i], one.tokens[i])
        other = slow(varied, PROMPTS[i].encode(), 2, 3 + i, sample=2)
        np.testing.assert_array_equal(many.tokens[3 * i + 2], other)


def test_a_row_ends_within_a_chunk(varied):
    """At its stop token or limit: what the chunk has after it is removed, other rows go on."""
    free = generate(varied, PROMPTS, max_new_tokens=6 * K, stop_tokens=())
    stop = int(free.tokens[1][5])
    out = generate(varied, PROMPTS, max_new_tokens=6 * K, stop_tokens=(stop,))
    for full, tokens, reason in zip(free.tokens, out.tokens, out.finish_reasons, strict=True):
        ends = np.flatnonzero(full == stop)
        expected = full[: ends[0] + 1] if len(ends) else full
        np.testing.assert_array_equal(tokens, expected)
        assert reason == ("stop" if len(ends) else "length")
    assert len(out.tokens[1]) <= 6 and out.draws[1] <= 2
    assert out.text[1] == varied.tokenizer.decode(out.tokens[1][:-1].tolist())
    limits = generate(varied, PROMPTS, max_new_tokens=[1, 6, 11], stop_tokens=())
    for full, tokens, limit in zip(free.tokens, limits.tokens, [1, 6, 11], strict=True):
        np.testing.assert_array_equal(tokens, full[:limit])
    # A stop token that stands after the limit is none.
    assert limits.draws == [1, 2, 3] and limits.finish_reasons == ["length"] * 3
    bounded = generate(varied, PROMPTS, max_new_tokens=24, max_length=18, stop_tokens=())
    assert [len(t) for t in bounded.tokens] == [14, 6, 2]


def test_the_end_of_sequence_is_the_models_own(varied):
    free = generate(varied, PROMPTS, max_new_tokens=8 * K, stop_tokens=(), seed=3)
    own = generate(varied, PROMPTS, max_new_tokens=8 * K, seed=3)
    eos = varied.config.eos_token_id
    assert any(eos in tokens for tokens in free.tokens)
    for full, tokens in zip(free.tokens, own.tokens, strict=True):
        ends = np.flatnonzero(full == eos)
        np.testing.assert_array_equal(tokens, full[: ends[0] + 1] if len(ends) else full)


def test_streaming_yields_what_generate_returns(varied):
    settings = {"max_new_tokens": 10 * K, "seed": 2, "stop": ("o",)}
    whole = generate(varied, PROMPTS, **settings)
    text, reasons = [""] * 3, {}
    for piece in jaxalope.stream(varied, PROMPTS, **settings, stride=1):
        text[piece.row] += piece.text
        if piece.finish_reason:
            reasons[piece.row] = piece.finish_reason
    assert text == whole.text and [reasons[i] for i in range(3)] == whole.finish_reasons


def test_stop_strings_end_a_row(varied):
    free = generate(varied, PROMPTS[0], max_new_tokens=10 * K, stop_tokens=())
    readable = next(c for c in free.text[0] if c.isprintable() and c != "\ufffd")
    out = generate(varied, PROMPTS[0], max_new_tokens=10 * K, stop_tokens=(), stop=readable)
    assert out.text[0] == free.text[0][: free.text[0].index(readable)]
    assert out.finish_reasons == ["stop"]
    np.testing.assert_array_equal(out.tokens[0], free.tokens[0][: len(out.tokens[0])])


def test_cancelled_rows_end_as_they_are(varied):
    answers = iter([False, True])
    out = generate(varied, PROMPTS, max_new_tokens=200, stop_tokens=(), cancel=answers.__next__)
    assert out.finish_reasons == ["cancelled"] * 3 and [len(t) for t in out.tokens] == [64] * 3


# -- Prompts that are no whole chunks -------------------------------------------------------------


def test_pads_before_or_after(varied):
    pad = varied.config.pad_token_id
    settings = {"max_new_tokens": 8, "stop_tokens": ()}
    for remainder, padded in (("left", [pad, *b"abcdefg"]), ("right", [*b"abcdefg", pad])):
        out = generate(varied, ["abcdefg", "abcd"], **settings, remainder=remainder)
        expected = generate(varied, [padded, list(b"abcd")], **settings)
        same(out, expected)


@pytest.mark.parametrize("policy", [None, BatchTemperature(0.5, 4)], ids=["exact", "batch"])
def test_a_remainder_is_met_by_rejection(peaked, policy):
    """The first draw that begins as the prompt ends is the one; what follows is as ever."""
    free = generate(peaked, ["abcd"], policy, 3 * K, seed=11, stop_tokens=())
    first = free.tokens[0]
    for rest in (1, 2, 3):
        prompt = [*b"abcd", *first[:rest].tolist()]
        prompts = [list(b"abcdefgh"), prompt]
        settings = {"stop_tokens": (), "remainder": "reject"}
        out = generate(peaked, prompts, policy, 3 * K - rest, seed=[4, 11], **settings)
        alone = generate(peaked, [prompt], policy, 3 * K - rest, seed=[11], **settings)
        np.testing.assert_array_equal(out.tokens[1], alone.tokens[0])
        assert len(out.tokens[1]) == 3 * K - rest and not out.exhausted[1]
        if policy is None:  # The same draws: the first of all begins so.
            np.testing.assert_array_equal(out.tokens[1], first[rest:])
            assert out.draws == [3, 3]


def test_the_law_of_a_remainder_is_the_conditional_one(peaked):
    """Many samples after the first token of a chunk, against draws of whole chunks.

    Five standard errors of each frequency's difference: a right sampler fails once in a million.
    """
    free = generate(peaked, ["abcd"], max_new_tokens=K, n=3000, stop_tokens=())
    chunks = np.stack(free.tokens)
    token = np.bincount(chunks[:, 0]).argmax()
    matching = chunks[chunks[:, 0] == token][:, 1:]
    prompt = [[*b"abcd", int(token)]]
    settings = {"n": 3000, "stop_tokens": (), "seed": 99, "remainder": "reject"}
    found = np.stack(generate(peaked, prompt, max_new_tokens=K - 1, **settings).tokens)
    for chunk in np.unique(np.concatenate([matching, found]), axis=0):
        p, q = ((x == chunk).all(1).mean() for x in (matching, found))
        variance = max(p * (1 - p), 1e-3) / len(matching) + max(q * (1 - q), 1e-3) / len(found)
        assert abs(p - q) < 5 * np.sqrt(variance)


def test_a_remainder_that_never_comes_is_flagged(varied):
    prompt = [*b"abcd", 319, 319, 319]
    policy = [ExactTemperature(1.0, 50), ExactTemperature(1.0)]
    with pytest.warns(UserWarning, match=r"rows \[0\] used up max_draws"):
        out = generate(
            varied, [prompt, list(b"abcd")], policy, 9, stop_tokens=(319,), remainder="reject"
        )
    # A stop token of the prompt ends nothing.
    assert out.exhausted == [True, False] and len(out.tokens[0]) == 9
    assert out.draws == [50 + 2, 3]


def test_an_exhausted_budget_is_flagged_in_a_stream(varied):
    with pytest.warns(UserWarning, match="max_draws"):
        list(jaxalope.stream(varied, "abcd", ExactTemperature(0.25, 20), 8, stop_tokens=()))


# -- One compilation, meshes, other chunk sizes ---------------------------------------------------


def test_compilations(peaked):
    model = dataclasses.replace(peaked)
    decoder = program_of(model, NextVector, ())
    for prompts, temperature in ((["abcd"], 1.0), (["abcdefgh"], 0.9), (["x" * 60], 0.8)):
        generate(model, prompts, Temperature(temperature), 4, stop_tokens=())
    assert decoder.prefill._cache_size() == 1 and decoder.decode._cache_size() == 1
    generate(model, ["x" * 64], Temperature(0.9), 4, stop_tokens=())
    assert decoder.prefill._cache_size() == 2 and decoder.decode._cache_size() == 2


@pytest.mark.parametrize("policy", [ExactTemperature(0.5, 200), BatchTemperature(0.5, 9)])
@pytest.mark.filterwarnings("ignore:rows")
def test_on_a_mesh(peaked, policy):
    sharded = peaked.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    prompts = [*(list(p.encode()) for p in PROMPTS), list(b"abcde")]
    prompts[3][4] = int(generate(peaked, ["abcd"], max_new_tokens=1, stop_tokens=()).tokens[0][0])
    settings = {"n": 2, "stop_tokens": (), "remainder": "reject"}
    one = generate(peaked, prompts[1:], policy, 8, **settings)
    same(generate(sharded, prompts[1:], policy, 8, **settings), one)


def test_chunks_that_divide_no_bucket():
    config = dataclasses.replace(
        CALMConfig.tiny(),
        autoencoder=dataclasses.replace(CALMAutoencoderConfig.tiny(), chunk_size=3),
        head="flow",
        head_steps=2,
    )
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    last = params["latent_head"]["network"]["output_proj"]
    last["kernel"] = jax.random.normal(jax.random.key(5), last["kernel"].shape)
    model = jaxalope.Model(config, graphdef, params)
    prompts = [list(b"abcdef"), list(range(63))]
    out = generate(model, prompts, max_new_tokens=7, stop_tokens=())
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(out.tokens[i], slow(model, prompt, 3, i)[:7])


# -- What has no meaning here ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": TopP(0.9)}, ["TopP", "ExactTemperature"]),
        ({"policy": Chain(Temperature(0.7), TopP(0.9))}, ["TopP", "no", "logits"]),
        ({"policy": Greedy()}, ["Greedy", "BatchTemperature"]),
        ({"policy": Temperature(2.0)}, ["temperature=2.0", "flatten"]),
        ({"top_logprobs": 3}, ["top_logprobs", "likelihood", "leave it out"]),
        ({"logprobs": "processed"}, ["logprobs", "likelihood"]),
        ({"grammar": Regex("a+")}, ["grammar", "n=..."]),
        ({"draft": PromptLookup(4)}, ["draft", "leave it out"]),
        ({"remainder": "middle"}, ["remainder='middle'", "reject"]),
        ({"prompts": ["abcd", "abcdef"]}, ["prompts[1]", "6 tokens", "'left'", "'reject'"]),
        ({"prompts": ["abc"], "remainder": "reject"}, ["prompts[0]", "3 tokens", "'left'"]),
        ({"prompts": ["abcd"], "max_new_tokens": 0}, ["max_new_tokens=0"]),
    ],
)
def test_what_has_no_meaning_is_named(varied, arguments, words):
    arguments = {"prompts": ["abcd"], **arguments}
    with pytest.raises(InputError) as error:
        generate(varied, **arguments)
    for word in words:
        assert word in str(error.value)


def test_no_pad_token(varied):
    autoencoder = dataclasses.replace(varied.config.autoencoder, pad_token_id=None)
    config = dataclasses.replace(varied.config, autoencoder=autoencoder)
    with pytest.raises(InputError, match="no pad token"):
        generate(dataclasses.replace(varied, config=config), "abc", remainder="left")


def test_other_decoders_name_generate(varied):
    for call in (
        lambda: beam_search(varied, ["abcd"], 2, 4),
        lambda: jaxalope.power_sample(varied, ["abcd"], t_max=4),
        lambda: jaxalope.denoise(varied, ["abcd"]),
    ):
        with pytest.raises(InputError, match=r"jaxalope\.generate"):
            call()


def test_other_models_refuse_what_is_of_chunks():
    config = jaxalope.model.GPTNeoXConfig.tiny()
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    model = jaxalope.Model(config, graphdef, params)
    with pytest.raises(InputError, match="remainder='left'"):
        generate(model, [[1, 2]], remainder="left", max_new_tokens=2)
    for policy in (ExactTemperature(0.5), BatchTemperature(0.5)):
        with pytest.raises(InputError, match="give Temperature"):
            generate(model, [[1, 2]], policy, max_new_tokens=2)


def test_the_models_own_settings_are_named(varied):
    defaults = jaxalope.model.generation_defaults.GenerationDefaults(do_sample=True, top_p=0.9)
    model = dataclasses.replace(varied, defaults=defaults)
    with pytest.raises(InputError, match=r"generation_config\.json.*policy=ExactTemperature"):
        generate(model, "abcd", max_new_tokens=4)
    assert generate(model, "abcd", ExactTemperature(), max_new_tokens=4).tokens
