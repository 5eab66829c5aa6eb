"""Speculative decoding has the law of plain decoding, whatever is drafted, and its greedy text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import chi_square_accepts, law
from toys import TableConfig, hybrid_model, table_model

import jaxalope
from jaxalope import (
    Chain,
    DraftModel,
    Greedy,
    InputError,
    Model,
    PresenceFrequencyPenalty,
    PromptLookup,
    RepetitionPenalty,
    Temperature,
)
from jaxalope.infer import NextToken, Speculative
from jaxalope.infer.cache import CacheLayout
from jaxalope.infer.drafts import Drafts
from jaxalope.infer.policy import Context
from jaxalope.infer.programs import program_of
from jaxalope.infer.records import LogProb
from jaxalope.infer.request import make_batch
from jaxalope.infer.speculative import Accepted, Drafted, judge
from jaxalope.model import CALMConfig, KimiLinearConfig, LLaDAConfig, build_model
from jaxalope.sharding import MeshConfig, abstract, make_mesh

pytestmark = pytest.mark.long

PROMPTS = ["def f(x):\n  def f(x):\n", "i", "class Jackalope:"]
RECORDS = (LogProb(), Drafted(), Accepted())


@pytest.fixture(scope="module")
def small():
    return hybrid_model()


def toy(seed, recurrent=False, size=4, order=2):
    return table_model(TableConfig(size, order, recurrent=recurrent), seed=seed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Always:
    """Drafts one token again and again, or nothing: somebody else's draft."""

    token: int = dataclasses.field(default=0, metadata={"static": True})
    count: int = dataclasses.field(default=3, metadata={"static": True})
    num_tokens: int = dataclasses.field(default=3, metadata={"static": True})
    needs = frozenset()

    def start(self, model):
        return self

    def init_cache(self, batch, max_length):
        return ()

    def read(self, tokens, cache, segment_ids):
        return cache

    def draft(self, policy, state):
        tokens = jnp.full((len(state.length), self.num_tokens), self.token)
        return Drafts(tokens, jnp.full_like(state.length, self.count)), ()


def decode(model, draft, policy, prompt, count, slots, stop=-1, max_steps=1000):
    """``count`` rows decoded by the loop itself, without the host's part: the final state."""
    shape = (count,)
    drafter = draft.start(model)
    params, width = (model.params, drafter), len(prompt)
    decoder = program_of(model, Speculative, RECORDS)
    state = decoder.prefill(
        params,
        np.tile(np.array(prompt, np.int32), (count, 1)),
        np.full(shape, width, np.int32),
        np.full(shape, width + slots, np.int32),
        np.arange(count, dtype=np.uint32),
        np.zeros(shape, np.int32),
        capacity=width + slots + draft.num_tokens,
        needs=policy.needs | drafter.needs,
    )
    stops = np.full((count, 1), stop, np.int32)
    while not bool(state.done.all()):
        state = decoder.decode(params, policy, state, stops, jnp.int32(max_steps))
    return state


def outputs(state):
    tokens, start, end = map(np.asarray, (state.tokens, state.prompt_length, state.length))
    return [row[a:b] for row, a, b in zip(tokens, start, end, strict=True)]


# -- The law ---------------------------------------------------------------------------------------


def test_acceptance_of_the_golden_distributions(fixtures):
    """300,000 draws each: total variation up to .01, the accepted share sum(min(p, q)) to .005.

    The share's standard error is .0009 and the mean total variation .0015: an alarm is never false.
    """
    golden = np.load(fixtures / "sampling" / "sampler_processors.npz")
    p, q = golden["spec_p"], golden["spec_q"]
    cases, size = p.shape
    count = 300_000

    @jax.jit
    def draw(seeds):
        keys = jax.vmap(jax.random.key)(seeds)
        p_rows, q_rows = (jnp.repeat(jnp.log(x.astype(np.float32)), count, 0) for x in (p, q))
        drafts = jax.vmap(jax.random.categorical)(
            jax.vmap(jax.random.fold_in, (0, None))(keys, 1), q_rows
        )
        zeros = jnp.zeros_like(seeds, dtype=jnp.int32)
        everywhere = jnp.ones_like(zeros, dtype=bool)
        context = Context(None, zeros, zeros)
        return judge(Temperature(1.0), p_rows, context, keys, drafts, q_rows, everywhere)[:2]

    tokens, accepted = draw(np.arange(cases * count, dtype=np.uint32))
    tokens, accepted = (np.asarray(x).reshape(cases, count) for x in (tokens, accepted))
    np.testing.assert_allclose(golden["spec_total_accept"], np.minimum(p, q).sum(1))
    np.testing.assert_allclose(accepted.mean(1), golden["spec_total_accept"], atol=0.005)
    for case in range(cases):
        found = np.bincount(tokens[case], minlength=size) / count
        assert np.abs(found - p[case]).sum() / 2 <= 0.01


def penalised(logits, prompt, output):
    """What ``PENALTIES`` does, in NumPy."""
    counts = np.bincount(output, minlength=len(logits)) if output else np.zeros(len(logits))
    seen = (counts > 0) | np.isin(np.arange(len(logits)), prompt)
    logits = np.where(seen, np.where(logits > 0, logits / 1.5, logits * 1.5), logits)
    return (logits - 0.5 * (counts > 0) - 0.3 * counts) / 0.8


PENALTIES = Chain(RepetitionPenalty(1.5), PresenceFrequencyPenalty(0.5, 0.3), Temperature(0.8))
PLAIN = Temperature(1.0)


def processed(policy):
    return penalised if policy is PENALTIES else lambda logits, prompt, output: logits


@pytest.mark.parametrize(
    ("recurrent", "draft", "policy"),
    [
        (False, lambda: DraftModel(toy(8, recurrent=True, order=1)), PENALTIES),
        (True, lambda: DraftModel(toy(8), policy=Temperature(2.0), num_tokens=2), PENALTIES),
        (True, lambda: DraftModel(toy(8), policy=Greedy(), num_tokens=3), PLAIN),
        (True, lambda: PromptLookup(num_tokens=3, ngram=2), PENALTIES),
        (False, PromptLookup, PLAIN),
        (True, lambda: Always(token=1), PLAIN),
    ],
    ids=["model", "own policy", "greedy draft", "lookup penalised", "lookup", "constant"],
)
def test_law(recurrent, draft, policy):
    """Chi-square of 6000 responses of up to 5 tokens; its false-alarm rate is 1 in 14,000."""
    model, stop, slots = toy(7, recurrent), 3, 5
    state = decode(model, draft(), policy, [0], 6000, slots, stop)
    expected = law(model, [0], stop, slots, processed(policy))
    assert chi_square_accepts(outputs(state), expected)
    drafted, accepted = (np.asarray(state.records[name]).sum() for name in ("drafted", "accepted"))
    assert 0 < accepted < drafted


def test_a_wrong_law_is_noticed():
    """The test above can fail: the same draws against the law without penalties."""
    draft = DraftModel(toy(8, recurrent=True, order=1))
    state = decode(toy(7), draft, PENALTIES, [0], 6000, 5, 3)
    assert not chi_square_accepts(outputs(state), law(toy(7), [0], 3, 5))


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("policy", [PENALTIES, Greedy()], ids=["drawn", "greedy"])
def test_a_draft_by_the_target_is_accepted(recurrent, policy):
    model = toy(7, recurrent)
    state = decode(model, DraftModel(model), policy, [0], 200, 13)
    drafted, accepted = (np.asarray(state.records[name]).sum(1) for name in ("drafted", "accepted"))
    np.testing.assert_array_equal(drafted, accepted)
    # Two whole steps of 4 drafts and a draw; three drafts before the limit.
    np.testing.assert_array_equal(accepted, 4 + 4 + 3)


def test_without_drafts_it_is_plain_decoding():
    """Bit for bit, randomness included."""
    model, prompts = toy(7, recurrent=True), [[0], [1, 2]]
    plain = jaxalope.generate(model, prompts, PENALTIES, 12, seed=3)
    found = jaxalope.generate(model, prompts, PENALTIES, 12, seed=3, draft=Always(count=0))
    assert found.drafted == found.accepted == [0, 0] and plain.drafted is None
    for a, b in zip(found.tokens + found.logprobs, plain.tokens + plain.logprobs, strict=True):
        np.testing.assert_array_equal(a, b)


# -- Equal to plain greedy decoding ----------------------------------------------------------------


def test_greedy_on_kimi_linear():
    model = hybrid_model(KimiLinearConfig.tiny())
    plain = jaxalope.generate(model, PROMPTS, Greedy(), 24, stop_tokens=())
    found = jaxalope.generate(model, PROMPTS, Greedy(), 24, stop_tokens=(), draft=PromptLookup(3))
    assert 0 < sum(found.accepted) < sum(found.drafted)
    for i in range(len(PROMPTS)):
        np.testing.assert_array_equal(found.tokens[i], plain.tokens[i])
        np.testing.assert_allclose(found.logprobs[i], plain.logprobs[i], atol=1e-4)
    assert found.text == plain.text and found.finish_reasons == plain.finish_reasons


@pytest.mark.parametrize("logprobs", ["raw", "processed"])
def test_records(logprobs):
    """What is said of each token is what plain decoding says, of drafts as of draws."""
    model, draft = toy(7, recurrent=True), DraftModel(toy(7), policy=Temperature(1.5))
    policy = Chain(PENALTIES, Temperature(0.0) if logprobs == "raw" else Greedy())
    asked = {"top_logprobs": 2, "logprobs": logprobs, "n": 2}
    plain = jaxalope.generate(model, [[1], [2]], policy, 12, **asked)
    found = jaxalope.generate(model, [[1], [2]], policy, 12, draft=draft, **asked)
    assert len(set(found.accepted)) > 1
    for i in range(4):
        np.testing.assert_array_equal(found.tokens[i], plain.tokens[i])
        np.testing.assert_allclose(found.logprobs[i], plain.logprobs[i], atol=1e-5)
        np.testing.assert_array_equal(found.top[i][0], plain.top[i][0])
        np.testing.assert_allclose(found.top[i][1], plain.top[i][1], atol=1e-5)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(
    "draft",
    [lambda: DraftModel(toy(7, size=9)), lambda: DraftModel(toy(6, size=9)), PromptLookup],
    ids=["same", "other", "lookup"],
)
def test_every_limit_and_stop_token(recurrent, draft):
    """Ends fall on every place of a step: after drafts, within them, on the draw."""
    model, draft = toy(7, recurrent, size=9), draft()
    prompts = [[1]] * 18
    new = [*range(1, 10), *[12] * 9]
    stops = [()] * 9 + [(i,) for i in range(9)]
    plain = jaxalope.generate(model, prompts, Greedy(), new, stop_tokens=stops)
    found = jaxalope.generate(model, prompts, Greedy(), new, stop_tokens=stops, draft=draft)
    assert found.finish_reasons == plain.finish_reasons
    for a, b in zip(found.tokens, plain.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    for tokens, accepted, drafted in zip(found.tokens, found.accepted, found.drafted, strict=True):
        assert accepted <= min(drafted, len(tokens))


# -- The loop's state ------------------------------------------------------------------------------


def test_the_cache_is_that_of_plain_decoding(small):
    """It has read all tokens of a row but the last, finished long before its neighbours or not."""
    batch = make_batch(small, PROMPTS, Temperature(0.0), [24, 3, 11], 0, (), headroom=2)

    def decoded(decoder, params):
        rows = (batch.prompts, batch.lengths, batch.limits, batch.seeds, batch.samples)
        state = decoder.prefill(params, *rows, capacity=batch.capacity)
        return decoder.decode(params, batch.policy, state, batch.stop_tokens, jnp.int32(100))

    plain = decoded(program_of(small, NextToken, (LogProb(),)), small.params)
    drafter = dataclasses.replace(drawn_by(small), policy=Temperature(0.3)).start(small)
    found = decoded(program_of(small, Speculative, RECORDS), (small.params, drafter))
    accepted, drafted = (int(found.records[name].sum()) for name in ("accepted", "drafted"))
    assert 0 < accepted < drafted
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.records["logprob"], plain.records["logprob"], atol=1e-4)
    layout = CacheLayout.of(small.module(), batch.capacity)
    assert layout.is_recurrent
    for cache in found.cache:
        np.testing.assert_array_equal(cache.length, found.length - 1)
        for a, b in zip(layout.recurrent(cache), layout.recurrent(plain.cache), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_interrupted_loop_equals_one_call():
    model, draft = toy(7, recurrent=True), DraftModel(toy(8, recurrent=True))
    whole = decode(model, draft, PENALTIES, [0, 1], 30, 12, 3)
    parts = decode(model, draft, PENALTIES, [0, 1], 30, 12, 3, max_steps=1)
    for name in ("tokens", "length", "reason"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    for name in whole.records:
        np.testing.assert_array_equal(whole.records[name], parts.records[name])


def drawn_by(model):
    """The draft of all tests of the small hybrid: one compilation."""
    return DraftModel(model, policy=Temperature(0.4), num_tokens=2)


def test_neighbours_do_not_matter(small):
    """Bit for bit, however many drafts the others had accepted and were read again."""
    policy, draft = Temperature(0.2), drawn_by(small)

    def generated(prompts, seeds):
        return jaxalope.generate(small, prompts, policy, 20, seeds, stop_tokens=(), draft=draft)

    first = generated(PROMPTS, [5, 6, 7])
    assert 0 < sum(first.accepted) < sum(first.drafted) and len(set(first.accepted)) > 1
    second = generated([PROMPTS[1], "something else", PROMPTS[0]], [6, 8, 5])
    for i, j in ((0, 2), (1, 0)):
        np.testing.assert_array_equal(first.tokens[i], second.tokens[j])
        np.testing.assert_array_equal(first.logprobs[i], second.logprobs[j])
        assert first.accepted[i] == second.accepted[j]


def test_batched_equals_single():
    model, draft = toy(7, recurrent=True), DraftModel(toy(8, recurrent=True))
    prompts, new, seeds = [[0], [1, 2], [3]], [20, 14, 3], [5, 6, 7]
    policies = [PENALTIES, Temperature(0.5), Greedy()]
    together = jaxalope.generate(model, prompts, policies, new, seeds, draft=draft)
    for i, (prompt, policy) in enumerate(zip(prompts, policies, strict=True)):
        alone = jaxalope.generate(model, [prompt], policy, new[i], seeds[i : i + 1], draft=draft)
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        np.testing.assert_array_equal(together.logprobs[i], alone.logprobs[0])
        assert together.accepted[i] == alone.accepted[0]


def test_a_streams_pieces_join_to_the_text(small):
    arguments = (small, PROMPTS, Temperature(0.8), [15, 11, 4])
    found = jaxalope.generate(*arguments, draft=drawn_by(small))
    text = [""] * 3
    for piece in jaxalope.stream(*arguments, draft=drawn_by(small), stride=1):
        text[piece.row] += piece.text
    assert text == found.text


def test_sharded_equals_one_device(small):
    sharded = small.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))

    # Three prompts over four shares of the batch.
    expected, found = (
        jaxalope.generate(model, PROMPTS, Temperature(0.0), 10, draft=drawn_by(model))
        for model in (small, sharded)
    )
    assert found.text == expected.text
    assert found.accepted == expected.accepted


# -- Drafts ----------------------------------------------------------------------------------------


def looked_up(tokens, num_tokens, ngram):
    for size in range(min(ngram, len(tokens) - 1), 0, -1):
        for at in range(len(tokens) - 1, size - 1, -1):
            if tokens[at - size : at] == tokens[-size:]:
                following = tokens[at:]
                return [following[i % len(following)] for i in range(num_tokens)]
    return None


def test_prompt_lookup():
    rng = np.random.default_rng(0)
    length = rng.integers(1, 20, 200)
    tokens = rng.integers(0, 4, (200, 24))
    state = jaxalope.infer.DecodeState(
        jnp.asarray(tokens), jnp.asarray(length), *[None] * 5, (), {}
    )
    for num_tokens, ngram in ((1, 1), (4, 3), (6, 8)):
        drafts, _ = PromptLookup(num_tokens, ngram).draft(Greedy(), state)
        for row, size, found, count in zip(
            tokens, length, drafts.tokens, drafts.count, strict=True
        ):
            expected = looked_up(row[:size].tolist(), num_tokens, ngram)
            assert count == (0 if expected is None else num_tokens)
            if expected is not None:
                np.testing.assert_array_equal(found, expected)


def of_another_kind(family):
    """A model that decodes otherwise; it has no weights, as none are looked at."""
    config = family.tiny()
    graphdef, shapes, _ = abstract(lambda key: build_model(config, key))
    return Model(config, graphdef, shapes)


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        (lambda: DraftModel(toy(1, size=5)), "vocabulary of 5 and the target one of 4"),
        (lambda: DraftModel(of_another_kind(CALMConfig)), "CALMConfig decodes by 'next_vector'"),
        (lambda: DraftModel(of_another_kind(LLaDAConfig)), "decodes by 'masked_diffusion'"),
        (lambda: DraftModel(toy(1), num_tokens=0), "num_tokens=0 must be at least 1"),
        (lambda: PromptLookup(ngram=0), "ngram=0 must be at least 1"),
        (lambda: PromptLookup(2.0), "draft: num_tokens=2.0 must be a whole number"),
        (lambda: toy(1), "is no draft; give DraftModel"),
        (
            lambda: DraftModel(dataclasses.replace(toy(1), mesh=make_mesh(MeshConfig(data=8)))),
            "load both on one",
        ),
    ],
    ids=["vocabulary", "vectors", "masks", "num_tokens", "ngram", "float", "no draft", "mesh"],
)
def test_bad_input_is_named(draft, words):
    with pytest.raises(InputError, match=words):
        jaxalope.generate(toy(0), [[0]], draft=draft())
