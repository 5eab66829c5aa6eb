"""What users ask of generation: samples, stops, streams, log-probabilities, rows of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import TableConfig, hybrid_model, table_model

import jaxalope
from jaxalope import Greedy, InputError, RepetitionPenalty, Temperature, TopK, TopP
from jaxalope.infer import Chain
from jaxalope.infer.cache import CacheLayout
from jaxalope.infer.driver import decoder_of

pytestmark = pytest.mark.long

PROMPTS = ["def f(x):", "i", "class Jackalope: has antlers"]


@pytest.fixture(scope="module")
def model():
    return hybrid_model()


@pytest.fixture(scope="module")
def plain(model):
    return jaxalope.generate(model, PROMPTS, Temperature(0.9), 20)


def test_samples_of_a_prompt_share_its_prefill_and_differ(model, plain):
    """The first sample is the one that is drawn alone; a sample does not depend on how many."""
    many = jaxalope.generate(model, PROMPTS, Temperature(0.9), 20, n=3)
    assert len(many.text) == 9
    for i, tokens in enumerate(plain.tokens):
        np.testing.assert_array_equal(many.tokens[3 * i], tokens)
        assert len({many.text[3 * i + j] for j in range(3)}) == 3
    more = jaxalope.generate(model, PROMPTS[1], Temperature(0.9), 20, seed=[1], n=5)
    assert more.text[:3] == many.text[3:6]


def test_rows_follow_policies_of_their_own(model):
    """A row of a mixed batch is what its policy gives alone, token for token."""
    policies = [
        Greedy(),
        Chain(RepetitionPenalty(1.3), Temperature(0.7), TopK(5)),
        Chain(Temperature(1.1), TopP(0.8)),
    ]
    mixed = jaxalope.generate(model, PROMPTS, policies, 20)
    for i, policy in enumerate(policies):
        alone = jaxalope.generate(model, PROMPTS[i], policy, 20, seed=[i])
        np.testing.assert_array_equal(mixed.tokens[i], alone.tokens[0])


def test_stop_tokens_and_lengths_of_their_own(model, plain):
    stops = [[int(plain.tokens[0][4])], [], [int(plain.tokens[2][7]), int(plain.tokens[0][4])]]
    out = jaxalope.generate(model, PROMPTS, Temperature(0.9), [20, 11, 20], stop_tokens=stops)
    for i, (found, free) in enumerate(zip(out.tokens, plain.tokens, strict=True)):
        np.testing.assert_array_equal(found, free[: len(found)])
        ends = [int(t) in stops[i] for t in found]
        assert not any(ends[:-1])
        assert out.finish_reasons[i] == ("stop" if ends[-1] else "length")
    assert len(out.tokens[1]) == 11
    assert out.finish_reasons[0] == "stop"


def test_stop_strings(model, plain):
    text = plain.text[2]
    stop = text[5:8]
    out = jaxalope.generate(model, PROMPTS, Temperature(0.9), 20, stop=(stop,))
    for found, free, reason in zip(out.text, plain.text, out.finish_reasons, strict=True):
        assert found == (free[: free.index(stop)] if stop in free else free)
        assert reason == ("stop" if stop in free else "length")
    # Tokens up to the one that completed the string; as many log-probabilities.
    assert model.tokenizer.decode(out.tokens[2].tolist()).endswith(stop)
    assert len(out.logprobs[2]) == len(out.tokens[2])


@pytest.mark.parametrize("stride", [1, 7])
def test_streamed_pieces_are_the_text(model, plain, stride):
    texts, reasons = [""] * 3, {}
    for piece in jaxalope.stream(model, PROMPTS, Temperature(0.9), 20, stride=stride):
        assert piece.row not in reasons, "nothing follows a row's last piece"
        texts[piece.row] += piece.text
        if piece.finish_reason:
            reasons[piece.row] = piece.finish_reason
    assert texts == plain.text
    assert [reasons[i] for i in range(3)] == plain.finish_reasons


def test_a_closed_stream_decodes_no_further(model):
    decoder = decoder_of(model)
    steps = []
    decode = decoder.decode

    def counted(params, policy, state, stops, max_steps):
        steps.append(int(max_steps))
        return decode(params, policy, state, stops, max_steps)

    decoder.__dict__["decode"] = counted
    try:
        pieces = jaxalope.stream(model, "a", Temperature(0.9), 100, stride=5)
        next(pieces)
        pieces.close()
    finally:
        decoder.__dict__["decode"] = decode
    assert steps == [5]


def test_cancellation_keeps_what_is_there(model, plain):
    asked = []
    out = jaxalope.generate(
        model, PROMPTS, Temperature(0.9), 64, cancel=lambda: len(asked) == 1 or asked.append(1)
    )
    assert out.finish_reasons == ["cancelled"] * 3
    for found, free in zip(out.tokens, plain.tokens, strict=True):
        assert len(found) == 16
        np.testing.assert_array_equal(found, free[:16])


def test_top_logprobs(model):
    policy = Chain(Temperature(0.5), TopK(3))
    raw = jaxalope.generate(model, PROMPTS[:1], policy, 8, top_logprobs=5)
    logits = model(np.array([[*PROMPTS[0].encode(), *raw.tokens[0]]]))[0][0]
    logits = logits[len(PROMPTS[0]) - 1 : -1]
    expected = jax.nn.log_softmax(logits)
    ids, values = raw.top[0]
    np.testing.assert_array_equal(ids, np.argsort(-expected, axis=-1)[:, :5])
    np.testing.assert_allclose(values, -np.sort(-expected, axis=-1)[:, :5], atol=1e-4)
    chosen = np.take_along_axis(np.asarray(expected), raw.tokens[0][:, None], 1)[:, 0]
    np.testing.assert_allclose(raw.logprobs[0], chosen, atol=1e-4)

    processed = jaxalope.generate(
        model, PROMPTS[:1], policy, 8, top_logprobs=5, logprobs="processed"
    )
    np.testing.assert_array_equal(processed.tokens[0], raw.tokens[0])
    expected = jax.nn.log_softmax(policy(logits))
    ids, values = processed.top[0]
    np.testing.assert_allclose(values[:, :3], -np.sort(-expected, axis=-1)[:, :3], atol=1e-4)
    assert (values[:, 3:] == -np.inf).all()


def test_finished_rows_do_not_move(model):
    """A row that ended and then may go on continues as one that never stopped: recurrent, too."""
    decoder, policy = decoder_of(model), Temperature(0.9)
    rows = (np.array([[5, 6, 7], [8, 9, 0]], np.int32), np.array([3, 2], np.int32))
    stops = np.full((2, 1), -1, np.int32)

    def start(limits):
        seeds = np.arange(2, dtype=np.uint32)
        return decoder.prefill(
            model.params,
            *rows,
            np.array(limits, np.int32),
            seeds,
            np.zeros(2, np.int32),
            capacity=64,
        )

    def decode(state):
        return decoder.decode(model.params, policy, state, stops, jnp.int32(64))

    whole = decode(start([20, 20]))
    halted = decode(start([6, 20])).with_limit(jnp.array([20, 20]))
    assert halted.reason.tolist() == [0, 2]
    np.testing.assert_array_equal(decode(halted).tokens, whole.tokens)


def test_layout_is_read_off_shapes(model):
    module = model.module()
    layout = CacheLayout.of(module, 32)
    cache = module.init_cache(3, 32)
    assert layout.is_recurrent
    for leaf, batch, position in zip(
        jax.tree.leaves(cache), layout.batch, layout.position, strict=True
    ):
        assert leaf.shape[batch] == 3
        assert position is None or leaf.shape[position] == 32
    taken = layout.take(cache, jnp.array([2, 2, 0, 1]))
    assert jax.tree.leaves(taken)[0].shape[layout.batch[0]] == 4
    toy = table_model(TableConfig(3, 2)).module()
    assert not CacheLayout.of(toy, 8).is_recurrent
    assert CacheLayout.of(table_model(TableConfig(3, 2, recurrent=True)).module(), 8).is_recurrent


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, "n=0"),
        ({"policy": [Greedy()] * 2}, "policy has 2 entries for 3 prompts"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 entries for 3 prompts"),
        ({"stop_tokens": [[1], [2]]}, "stop_tokens has 2 rows for 3 prompts"),
        ({"stop_tokens": [999]}, "token id 999"),
        ({"stop_tokens": [[1], 2, 3]}, "mixes ids and lists"),
        ({"stop_tokens": "x"}, "stop_tokens='x' must be a list of token ids"),
        ({"stop": ("",)}, "empty string"),
        ({"stop": [b"x"]}, r"stop=\(b'x',\) must be a string, or a sequence of strings"),
        ({"stop": 3}, "stop=3 must be a string"),
        ({"top_logprobs": 21}, "top_logprobs=21"),
        ({"top_logprobs": 2.0}, "top_logprobs=2.0 must be a whole number"),
        ({"grammar": "[ab]+"}, r"grammar='\[ab\]\+' is no grammar; give grammar.Regex"),
        ({"grammar": [{}, None, None]}, "grammar={} is no grammar; give grammar.JsonSchema"),
        ({"logprobs": "cooked"}, "logprobs='cooked'"),
        ({"max_length": 20}, "prompts\\[2\\] has 28 tokens"),
    ],
)
def test_bad_input_is_named(model, settings, words):
    with pytest.raises(InputError, match=words):
        jaxalope.generate(model, PROMPTS, **settings)


def test_texts_stop_at_the_longest_cache_allowed(model, plain):
    out = jaxalope.generate(model, PROMPTS, Temperature(0.9), 20, max_length=32)
    assert [len(tokens) for tokens in out.tokens] == [20, 20, 4]
    np.testing.assert_array_equal(out.tokens[2], plain.tokens[2][:4])


def test_a_model_without_a_tokenizer():
    toy = table_model(TableConfig(5, 2))
    out = jaxalope.generate(toy, [[1], [2, 3]], max_new_tokens=4)
    assert out.text == ["", ""]
    with pytest.raises(InputError, match="stop"):
        jaxalope.generate(toy, [[1]], stop=("a",))
    assert dataclasses.asdict(out)["starved"] == [False, False]
