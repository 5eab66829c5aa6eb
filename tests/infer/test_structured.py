"""Texts follow their grammar, whatever the model says; and the two halves of a step are a step."""

import dataclasses
import json

import numpy as np
import pytest
from toys import hybrid_model

import jaxalope
from jaxalope import BadWords, Chain, Greedy, InputError, Model, NoRepeatNgram, Temperature, TopK
from jaxalope.infer.grammar import Json, JsonSchema, Regex, Vocabulary
from jaxalope.infer.structured import Guided, GuidedRun
from jaxalope.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.long

SCHEMA = JsonSchema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "legs": {"enum": [2, 4]}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    },
    whitespace=0,
)


@pytest.fixture(scope="module")
def model():
    return hybrid_model()


def test_three_hundred_json_texts(model):
    """Every text that ended parses; every other is a beginning that the grammar allows."""
    grammar = Json(0).compile(model.tokenizer, backend="python")
    out = jaxalope.generate(model, [f"{i}" for i in range(300)], max_new_tokens=24, grammar=grammar)
    ended = 0
    for tokens, text, reason in zip(out.tokens, out.text, out.finish_reasons, strict=True):
        matcher = grammar.matcher()
        assert all(matcher.accept(int(token)) for token in tokens)
        if reason == "stop":
            json.loads(text)
            ended += 1
    assert 30 < ended < 300
    assert not any(out.starved)


@pytest.mark.parametrize("backend", ["python", None])
def test_grammars_of_their_own_and_none(model, backend):
    vocabulary = Vocabulary.from_tokenizer(model.tokenizer)
    grammars = [g.compile(vocabulary, backend=backend) for g in (SCHEMA, Regex("(ab|ba){2}c*"))]
    prompts = ["a", "b", "c"]
    out = jaxalope.generate(model, prompts, max_new_tokens=60, grammar=[*grammars, None])
    assert json.loads(out.text[0])["legs"] in (2, 4)
    assert set(out.text[1]) <= set("abc")
    free = jaxalope.generate(model, ["c"], max_new_tokens=60, seed=[2])
    np.testing.assert_array_equal(out.tokens[2], free.tokens[0])
    alone = jaxalope.generate(model, ["b"], max_new_tokens=60, seed=[1], grammar=grammars[1])
    assert alone.text[0] == out.text[1]


def test_forced_tokens_change_nothing(model, monkeypatch):
    """Read in one call or drawn one by one under the mask: the same texts and log-probabilities."""
    model = dataclasses.replace(model)  # Another handle has compiled nothing yet.
    grammar = SCHEMA.compile(model.tokenizer, backend="python")
    settings = {"max_new_tokens": 60, "grammar": grammar, "n": 3}
    calls = []
    force = Guided._force
    monkeypatch.setattr(Guided, "_force", lambda *args: (calls.append(1), force(*args))[1])
    quick = jaxalope.generate(model, ["a", "b"], **settings)
    assert calls
    masks = GuidedRun._masks

    def without(self):
        ended, starved, forced = masks(self)
        return ended, starved, [[] for _ in forced]

    monkeypatch.setattr(GuidedRun, "_masks", without)
    slow = jaxalope.generate(model, ["a", "b"], **settings)
    assert quick.text == slow.text
    for a, b in zip(quick.logprobs, slow.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_limits_inside_forced_tokens(model):
    out = jaxalope.generate(model, ["a", "b"], max_new_tokens=[5, 60], grammar=SCHEMA)
    assert out.text[0] == '{"nam'
    assert out.finish_reasons[0] == "length"
    json.loads(out.text[1])


def test_a_grammar_that_forbids_everything_sets_the_flag(model):
    class Nowhere:
        def matcher(self):
            return self

        is_done = False

        def mask(self, words):
            words[:] = 0

    out = jaxalope.generate(model, ["a", "b"], max_new_tokens=8, grammar=[Nowhere(), None])
    assert out.starved == [True, False]
    assert len(out.tokens[0]) == 0
    assert len(out.tokens[1]) == 8
    assert np.isfinite(np.concatenate(out.logprobs)).all()


def test_without_a_grammar_the_two_halves_are_a_step(model):
    class Anything:
        def matcher(self):
            return self

        is_done = False

        def mask(self, words):
            words[:] = -1

        def accept(self, token):
            return True

    policy = Temperature(0.8)
    out = jaxalope.generate(model, ["a", "bcd"], policy, 20, grammar=Anything(), stop=("zz",))
    plain = jaxalope.generate(model, ["a", "bcd"], policy, 20, stop=("zz",))
    assert out.text == plain.text


def test_streamed_text_is_the_text(model):
    whole = jaxalope.generate(model, ["a"], max_new_tokens=60, grammar=SCHEMA).text[0]
    pieces = list(jaxalope.stream(model, ["a"], max_new_tokens=60, grammar=SCHEMA))
    assert "".join(piece.text for piece in pieces) == whole
    assert pieces[-1].finish_reason == "stop"


def test_on_a_mesh(model):
    sharded = model.on(make_mesh(MeshConfig(data=4, tensor=2)))
    out = jaxalope.generate(sharded, ["a", "b", "c"], max_new_tokens=40, grammar=SCHEMA)
    for text, reason in zip(out.text, out.finish_reasons, strict=True):
        if reason == "stop":
            json.loads(text)


def test_forbidding_stages_of_a_greedy_row_yield_to_the_grammar(model):
    policy = Chain(NoRepeatNgram(1), Greedy())
    out = jaxalope.generate(model, ["a"], policy, max_new_tokens=8, grammar=Regex("[yz]{3}"))
    assert len(out.text[0]) == 3 and set(out.text[0]) == {"y", "z"} and out.starved[0]


def test_a_forbidden_token_that_the_grammar_forces_is_flagged(model):
    """Drawn under the mask or read in one call with others; a row's flag is its own."""
    forbids = Chain(BadWords([[ord("o")]]), Temperature(1.0), TopK(3))
    settings = {"max_new_tokens": 6, "seed": 0}
    grammars = [Regex(x) for x in ("[xy]o", "[xy]ao", "[xy]a", "[xy]aoaaa|[xy]aob", "[xy]aaaaaao")]
    alone = [
        jaxalope.generate(model, ["a"], forbids, grammar=grammar, **settings).starved[0]
        for grammar in grammars
    ]
    # The last one's is past its limit.
    assert alone == [True, True, False, True, False]
    together = jaxalope.generate(model, ["a"] * 5, forbids, grammar=grammars, **settings)
    assert together.starved == alone
    policies = [forbids, Chain(NoRepeatNgram(1), Temperature(1.0)), Temperature(1.0)]
    mixed = jaxalope.generate(model, ["z"] * 3, policies, grammar=Regex("[xy]aobcd"), **settings)
    assert mixed.starved == [True, False, False]
    again = jaxalope.generate(model, ["z"] * 3, policies, grammar=Regex("[xy]abaca"), **settings)
    assert again.starved == [False, True, False]


def test_the_vocabulary_is_read_once_a_model(model, monkeypatch):
    jaxalope.generate(model, ["a"], max_new_tokens=2, grammar=Regex("ab"))
    monkeypatch.setattr(Vocabulary, "from_tokenizer", None)
    jaxalope.generate(model, ["a"], max_new_tokens=2, grammar=Regex("cd"))


def test_bad_input_is_named(model):
    with pytest.raises(InputError, match="grammar has 2 entries for 1 prompts"):
        jaxalope.generate(model, ["a"], grammar=[None, None])
    silent = Model(model.config, model.graphdef, model.params)
    with pytest.raises(InputError, match="needs a tokenizer"):
        jaxalope.generate(silent, [[1]], grammar=Json())
