"""Beam search equals its plain description, and enumeration where its width leaves nothing out."""

import jax
import numpy as np
import pytest
from exact import law, log_softmax, logits_of
from toys import TableConfig, golden_model, hybrid_model, table_model

import jaxalope
from jaxalope import (
    Chain,
    Greedy,
    InputError,
    PresenceFrequencyPenalty,
    beam_search,
)
from jaxalope.infer.policy import Policy, policy
from jaxalope.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.long

LAMBDAS = (1.0, 0.0, 0.6, 2.5, -1.0)
STOP, SLOTS = 3, 4  # Of the golden toy.


@pytest.fixture(scope="module")
def hybrid():
    return hybrid_model()


@pytest.fixture(scope="module", params=[False, True], ids=["positions", "recurrent"])
def toy(request):
    return golden_model(request.param)


def enumerate_all(model, prompt, stop, slots, penalty):
    """Every response with its score, the best first."""
    probabilities = law(model, prompt, stop, slots)
    return sorted(
        ((np.log(p) / len(r) ** penalty, r) for r, p in probabilities.items()), reverse=True
    )


def plain_beam_search(model, prompt, width, stop, slots, penalty, early=False, process=None):
    """The search in plain Python; ``stop`` are ids, ``process`` is a policy."""
    logits, live, pool = logits_of(model), [(0.0, ())], []

    def log_p(output):
        raw = logits([*prompt, *output])
        return log_softmax(raw if process is None else process(raw, prompt, output))

    for length in range(1, slots + 1):
        total = [
            (score + float(p), (*beam, token))
            for score, beam in live
            for token, p in enumerate(log_p(beam))
        ]
        total = sorted((t for t in total if t[0] > -np.inf), reverse=True)
        total = total[: (1 + len(stop)) * width]
        finished = [(s, b) for s, b in total if b[-1] in stop or length == slots]
        pool = sorted(pool + [(s / length**penalty, b) for s, b in finished], reverse=True)[:width]
        live = [(s, b) for s, b in total if b[-1] not in stop][:width]
        reach = (length if early else slots) if penalty > 0 else length + 1
        if not live or (len(pool) == width and live[0][0] / reach**penalty <= pool[-1][0]):
            break
    return pool


def check(found, expected, row=0):
    assert [tuple(t.tolist()) for t in found.tokens[row]] == [r for _, r in expected]
    np.testing.assert_allclose(found.scores[row], [s for s, _ in expected], atol=1e-5)


@pytest.mark.parametrize("penalty", LAMBDAS)
def test_wide_search_is_enumeration(toy, penalty):
    """27 prefixes of three tokens that do not end: so many beams leave nothing out."""
    expected = enumerate_all(toy, [0], STOP, SLOTS, penalty)[:27]
    found = beam_search(toy, [[0]], 27, SLOTS, penalty, (STOP,), n=27)
    check(found, expected)
    for tokens, reason in zip(found.tokens[0], found.finish_reasons[0], strict=True):
        assert reason == ("stop" if tokens[-1] == STOP else "length")


@pytest.mark.parametrize("penalty", LAMBDAS)
@pytest.mark.parametrize("early", [False, True])
def test_narrow_search_is_the_plain_one(penalty, early):
    """Longer responses than the toy's, so that searches end before the limit."""
    model = table_model(TableConfig(5, 2, recurrent=True), seed=4)
    found = beam_search(model, [[0], [1], [2]], 3, [9, 5, 7], penalty, (STOP,), n=3, early=early)
    for row, slots in enumerate((9, 5, 7)):
        check(found, plain_beam_search(model, [row], 3, (STOP,), slots, penalty, early), row)


def test_several_stop_tokens():
    """Two of three continuations may end: enough others are looked at."""
    model = table_model(TableConfig(3, 2), seed=1)
    found = beam_search(model, [[0]], 2, 6, 1.0, (0, 2), n=2)
    check(found, plain_beam_search(model, [0], 2, (0, 2), 6, 1.0))


@policy()
class NotTwice(Policy):
    """Forbids the token before."""

    needs = frozenset({"context"})

    def __call__(self, logits, context=None):
        last = jax.vmap(lambda row, i: row[i - 1])(context.tokens, context.length)
        return jax.numpy.where(jax.numpy.arange(logits.shape[1]) == last[:, None], -np.inf, logits)


def test_scores_are_the_policys():
    """Its context and counts are each beam's own."""
    model = table_model(TableConfig(4, 1), seed=2)
    policy = Chain(PresenceFrequencyPenalty(0.7, 0.4), NotTwice())

    def process(logits, prompt, output):
        counts = np.bincount(output, minlength=4) if output else np.zeros(4)
        logits = logits - 0.7 * (counts > 0) - 0.4 * counts
        return np.where(np.arange(4) == [*prompt, *output][-1], -np.inf, logits)

    found = beam_search(model, [[1]], 4, 6, 0.0, (STOP,), n=4, policy=policy)
    check(found, plain_beam_search(model, [1], 4, (STOP,), 6, 0.0, process=process))


def test_fewer_responses_than_asked_for():
    """Two tokens, the second of which ends: of five slots there are six responses."""
    model = table_model(TableConfig(2, 1), seed=3)
    found = beam_search(model, [[0]], 8, 5, 0.0, (1,), n=8)
    assert len(found.tokens[0]) == len(found.scores[0]) == 6
    check(found, enumerate_all(model, [0], 1, 5, 0.0))


def test_batched_equals_single(toy):
    together = beam_search(toy, [[0], [1, 0]], 3, [4, 3], stop_tokens=(STOP,), n=3)
    for i, prompt in enumerate(([0], [1, 0])):
        alone = beam_search(toy, [prompt], 3, 4 - i, stop_tokens=(STOP,), n=3)
        assert together.scores[i] == alone.scores[0]
        for a, b in zip(together.tokens[i], alone.tokens[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("recurrent", [False, True])
def test_one_beam_is_greedy(recurrent):
    model = table_model(TableConfig(7, 2, recurrent=recurrent), seed=5)
    prompts = [[1], [2, 3], [6]]
    greedy = jaxalope.generate(model, prompts, Greedy(), 10)
    found = beam_search(model, prompts, 1, 10)
    for i, tokens in enumerate(greedy.tokens):
        np.testing.assert_array_equal(found.tokens[i][0], tokens)
        np.testing.assert_allclose(found.logprobs[i][0], greedy.logprobs[i].sum(), atol=1e-4)


# Three prompts over four shares of the batch, three beams each.
HYBRID_SEARCH = (["def f(x):", "i", "class Jackalope:"], 3, 6, 0.7, ())


@pytest.fixture(scope="module")
def searched(hybrid):
    return beam_search(hybrid, *HYBRID_SEARCH, n=3)


def test_hybrid_scores_are_the_forward_passs(hybrid, searched):
    """Caches follow their beams: every token's probability is that of one uncached pass."""
    for i, prompt in enumerate(HYBRID_SEARCH[0]):
        prompt = hybrid.tokenizer.encode(prompt)
        assert len({tuple(t.tolist()) for t in searched.tokens[i]}) == 3
        assert searched.scores[i] == sorted(searched.scores[i], reverse=True)
        ids = np.array([[*prompt, *t] for t in searched.tokens[i]], np.int32)
        log_p = np.asarray(jax.nn.log_softmax(hybrid(ids)[0]))[:, len(prompt) - 1 : -1]
        total = np.take_along_axis(log_p, ids[:, len(prompt) :, None], axis=2).sum((1, 2))
        np.testing.assert_allclose(searched.logprobs[i], total, atol=1e-4)
        np.testing.assert_allclose(searched.scores[i], total / 6**0.7, atol=1e-4)
        assert searched.text[i][0] == hybrid.tokenizer.decode(searched.tokens[i][0].tolist())


def test_sharded_equals_one_device(hybrid, searched):
    sharded = hybrid.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    found = beam_search(sharded, *HYBRID_SEARCH, n=3)
    assert found.text == searched.text
    np.testing.assert_allclose(found.scores, searched.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"num_beams": 2, "n": 3}, r"n=3 must lie in 1\.\.num_beams=2"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
        ({"num_beams": 2, "max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_input_is_named(toy, arguments, words):
    with pytest.raises(InputError, match=words):
        beam_search(toy, [[0]], **arguments)
