"""What is drawn in denoising: its law, the policies, how a text ends, and what is refused."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from slow import MASK, golden_model, random_model, softmax

import jaxalope
from jaxalope import (
    BadWords,
    Chain,
    Factor,
    Greedy,
    Independent,
    InputError,
    LogitBias,
    MinNewTokens,
    NoRepeatNgram,
    Predicted,
    PresenceFrequencyPenalty,
    RepetitionPenalty,
    SoftTopP,
    Temperature,
    Threshold,
    TopCount,
    TopK,
    TopQuota,
    denoise,
    dream,
    parse_rule,
)

pytestmark = pytest.mark.long

PROMPT = [10, 78, 63, 13, 81]


@pytest.fixture(scope="module")
def model():
    return golden_model()


def proposal(model, canvas, place, temperature, k):
    """The cut and cooled distribution at a place, by hand."""
    logits = np.asarray(model(jnp.asarray(canvas)[None])[0], np.float64)[0, place].copy()
    logits[MASK] = -np.inf
    kept = np.argsort(-logits)[:k]
    return dict(zip(kept.tolist(), softmax(logits[kept] / temperature), strict=True))


@pytest.mark.parametrize("rule", [TopQuota("random"), TopCount(1, "random"), Independent()])
def test_two_tokens_in_random_order_have_their_exact_law(model, rule):
    """4,000 draws, each cell within six standard deviations: a wrong alarm is below 1e-6.

    The independent rule takes both positions in one step with probability 1 / 2.
    """
    n, canvas = 4000, np.array([*PROMPT, MASK, MASK])
    sets = {"gen_length": 2, "policy": Chain(Temperature(0.8), TopK(3)), "stop_tokens": ()}
    got = denoise(model, [PROMPT], rule=rule, n=n, **sets)
    law = {}
    together = 0.5 if isinstance(rule, Independent) else 0.0
    first = {p: proposal(model, canvas, p, 0.8, 3) for p in (5, 6)}
    for a, b in itertools.product(first[5], first[6]):
        law[a, b] = law.get((a, b), 0) + together * first[5][a] * first[6][b]
    for place, other in ((5, 6), (6, 5)):
        for token, p in first[place].items():
            now = canvas.copy()
            now[place] = token
            for second, q in proposal(model, now, other, 0.8, 3).items():
                pair = (token, second) if place == 5 else (second, token)
                law[pair] = law.get(pair, 0) + (1 - together) / 2 * p * q
    assert sum(law.values()) == pytest.approx(1)
    counts = {}
    for row in got.tokens:
        counts[tuple(row.tolist())] = counts.get(tuple(row.tolist()), 0) + 1
    assert set(counts) <= set(law)
    for pair, p in law.items():
        assert abs(counts.get(pair, 0) / n - p) < 6 * np.sqrt(p * (1 - p) / n) + 1 / n


@pytest.mark.parametrize(
    "rule",
    [
        TopQuota("leftmost"),
        TopQuota(schedule="cosine"),
        dream("maskgit_plus", 0.3),
        dream("topk_margin"),
        dream("entropy"),
        dream("origin"),
        jaxalope.EntropyBounded(1.0),
        jaxalope.Dynamic(0.2),
    ],
)
def test_every_rule_fills_everything_in(model, rule):
    steps = {"steps": 4} if rule.has_steps else {}
    got = denoise(model, [PROMPT, [3]], gen_length=8, rule=rule, stop_tokens=(), seed=3, **steps)
    for history, nfe in zip(got.history, got.nfe, strict=True):
        assert not np.any(history.tokens == MASK)
        when = history.step[history.step > 0]
        assert len(when) == 8
        assert sorted(set(when.tolist())) == list(range(1, nfe + 1)), "a call committed nothing"
        assert not steps or nfe <= 4
    if rule.score == "leftmost" and isinstance(rule, TopQuota):
        assert got.history[1].step[1:].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_stages_of_a_policy_mean_what_they_say(model):
    sets = {"gen_length": 8, "block_length": 4, "stop_tokens": ()}
    greedy = denoise(model, [PROMPT], **sets).tokens[0]
    assert denoise(model, [PROMPT], policy=Temperature(0.0), **sets).tokens[0].tolist() == (
        greedy.tolist()
    )
    # A nucleus so small, and an edge so sharp, that the best token is all that is left of it.
    sharp = denoise(model, [PROMPT], policy=SoftTopP(1e-6, 1e6), **sets)
    assert sharp.tokens[0].tolist() == greedy.tolist()
    most = int(np.bincount(greedy).argmax())
    without = denoise(model, [PROMPT], policy=Chain(LogitBias({most: -np.inf}), Greedy()), **sets)
    assert most not in without.tokens[0]
    # One a step, and what is there already is out of the question.
    once = Chain(PresenceFrequencyPenalty(presence=1e4, include_prompt=True), Greedy())
    distinct = denoise(model, [PROMPT], policy=once, **sets).history[0].tokens
    assert len(set(distinct.tolist())) == len(distinct)
    assert len(set(greedy.tolist())) < len(greedy)
    held = denoise(model, [PROMPT], policy=Chain(RepetitionPenalty(1e4), Greedy()), **sets)
    assert len(set(held.tokens[0].tolist())) == 8


def test_rows_may_have_policies_and_rules_of_their_own(model):
    prompts = [PROMPT, PROMPT]
    sets = {"gen_length": 8, "stop_tokens": (), "seed": [5, 5]}
    policies, rules = [Temperature(0.9), Greedy()], [Threshold(0.1), Threshold(0.6)]
    got = denoise(model, prompts, policy=policies, rule=rules, **sets)
    for i in range(2):
        sets["seed"] = [5]
        alone = denoise(model, [PROMPT], policy=policies[i], rule=rules[i], **sets)
        assert alone.tokens[0].tolist() == got.tokens[i].tolist()
        assert alone.nfe[0] == got.nfe[i]
    assert got.tokens[0].tolist() != got.tokens[1].tolist()


@pytest.mark.parametrize("block_length", [4, 12])
def test_a_row_that_ends_early_is_the_full_one_cut(model, block_length):
    sets = {"gen_length": 12, "block_length": block_length}
    full = denoise(model, [PROMPT], stop_tokens=(), **sets)
    canvas = full.tokens[0].tolist()
    stop = canvas[5]
    end = canvas.index(stop) + 1
    cut = denoise(model, [PROMPT], stop_tokens=(stop,), **sets)
    assert cut.tokens[0].tolist() == canvas[:end]
    assert cut.finish_reasons == ["stop"] and full.finish_reasons == ["length"]
    # All calls up to the one in which the last token before the end came, and no more.
    assert cut.nfe[0] == full.history[0].step[len(PROMPT) :][:end].max()


def test_a_token_that_ends_can_be_held_back(model):
    push = LogitBias({91: 50.0})
    sets = {"gen_length": 8, "policy": Chain(push, Greedy())}
    assert denoise(model, [PROMPT], **sets).tokens[0].tolist() == [91]
    never = denoise(model, [PROMPT], logits_eos_inf=True, **sets)
    assert 91 not in never.tokens[0] and never.finish_reasons == ["length"]
    late = Chain(push, MinNewTokens(3, [91]), Greedy())
    assert denoise(model, [PROMPT], gen_length=8, policy=late).tokens[0].tolist()[3] == 91
    # Pushed at the first positions only, it is committed there after everything else.
    some = Chain(LogitBias({91: 6.0}), Greedy())
    plain = denoise(model, [PROMPT], gen_length=8, policy=some, stop_tokens=(91,))
    last = denoise(
        model, [PROMPT], gen_length=8, policy=some, stop_tokens=(91,), confidence_eos_eot_inf=True
    )
    history = last.history[0]
    known = history.canvas(history.step.max())
    ends = (known == 91) & (history.step > 0)
    assert np.any(ends) and np.any(~ends & (history.step > 0))
    assert history.step[ends].min() > history.step[~ends].max()
    assert len(last.tokens[0]) >= len(plain.tokens[0])


def test_starving_is_reported(model):
    nothing = LogitBias(dict.fromkeys(range(96), -np.inf))
    got = denoise(model, [PROMPT, PROMPT], gen_length=2, policy=[nothing, Greedy()])
    assert got.starved == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 0}, "gen_length=0"),
        ({"gen_length": -3}, "gen_length=-3"),
        ({"gen_length": 10, "block_length": 4}, "block_length=4 does not divide"),
        ({"gen_length": 8, "block_length": 4, "steps": 3}, "steps=3 does not divide"),
        ({"steps": 4, "rule": Threshold(0.9)}, "steps=4"),
        ({"rule": [Threshold(0.9)] * 2}, "one for each of 1"),
        ({"rule": "threshold"}, "rule='threshold'"),
        ({"cache": "fast"}, "cache='fast'"),
        ({"cache": "block"}, "model.block_size"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
        ({"cfg_scale": [1.0, 2.0]}, "cfg_scale has 2"),
        ({"n": 0}, "n=0"),
        ({"seed": [1, 2]}, "seed has 2"),
        ({"stop_tokens": [96]}, "96"),
        ({"policy": Chain(NoRepeatNgram(2), Greedy())}, "NoRepeatNgram"),
        ({"policy": BadWords([[1, 2]])}, "BadWords"),
        ({"policy": Predicted()}, "Predicted"),
    ],
)
def test_what_cannot_be_done_is_named(model, settings, message):
    with pytest.raises(InputError, match=message):
        denoise(model, [PROMPT], **settings)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPT, rf"prompts\[0\]={PROMPT[0]} is a token id and no prompt"),
        ([PROMPT, None], r"prompts\[1\]=None must be a text"),
        ([[1.5]], "token ids are integers"),
        (3, "prompts=3 must be a text, or a sequence"),
    ],
)
def test_what_is_no_prompt_is_named(model, prompts, message):
    with pytest.raises(InputError, match=message):
        denoise(model, prompts, gen_length=2)


def test_guidance_needs_a_prompt(model):
    for prompt in ([], [MASK, MASK]):
        with pytest.raises(InputError, match=r"prompts\[1\] has none"):
            denoise(model, [PROMPT, prompt], gen_length=2, cfg_scale=1.0)
    assert len(denoise(model, [[]], gen_length=4).tokens[0]) <= 4


def test_the_wrong_kind_of_model_is_sent_to_the_other_door(model):
    with pytest.raises(InputError, match=r"jaxalope\.denoise"):
        jaxalope.generate(model, [PROMPT], max_new_tokens=2)
    from toys import TableConfig, table_model

    with pytest.raises(InputError, match=r"jaxalope\.generate"):
        denoise(table_model(TableConfig(4, 1)), [[1]])


def test_models_of_other_shapes_have_the_caches_that_fit():
    with pytest.raises(InputError, match="cache='block'"):
        denoise(random_model(block_size=4), [PROMPT], gen_length=4, cache="dual")
    with pytest.raises(InputError, match="block_length=2"):
        denoise(random_model(block_size=4), [PROMPT], gen_length=4, block_length=2)
    shifted = random_model(logit_shift=True)
    # The token of a place is asked for one place before.
    got = denoise(shifted, [PROMPT], gen_length=1, stop_tokens=()).tokens[0]
    logits = np.array(shifted(jnp.asarray([[*PROMPT, MASK]]))[0][0, len(PROMPT) - 1])
    logits[MASK] = -np.inf
    assert got.tolist() == [int(logits.argmax())]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("low_confidence", TopQuota()),
        ("random:cosine", TopQuota("random", "cosine")),
        ("sequential", TopQuota("leftmost")),
        ("threshold:0.8", Threshold(0.8)),
        ("factor", Factor(1.0)),
        ("count:3", TopCount(3)),
        ("first_hitting", TopCount(1, "random")),
        ("ancestral:poly2", Independent("poly2")),
        ("origin", dream("origin")),
        ("entropy:0.2", dream("entropy", 0.2)),
    ],
)
def test_rules_have_names(text, rule):
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold:0.9", "did you mean 'threshold'"),
        ("threshold:high", "takes a number"),
        ("threshold:2", "threshold=2"),
        ("count:1.5", "a whole number"),
        ("ancestral:even", "even"),
        ("origin:1", "no value"),
    ],
)
def test_a_rule_that_is_none_is_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_rule(text)
