"""Masks against the definition, token by token; accept, rollback, forced tokens."""

import dataclasses

import numpy as np
import pytest

from jaxalope.errors import InputError
from jaxalope.infer.grammar import Json, JsonSchema, Regex, Vocabulary, automaton
from jaxalope.infer.grammar.matcher import pack, unpack

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"enum": [1, 12, "é🦌"]}},
    "required": ["name"],
}
SPECS = [
    Regex("(a|ab|abc)+🦌?"),
    Regex(r"[^a]*\n"),
    Regex("é{2,3}"),
    Json(),
    Json(whitespace=0),
    JsonSchema(SCHEMA, whitespace=2),
    JsonSchema({"type": "string", "pattern": "^[ab]+$", "maxLength": 4}),
]


def python(spec, vocabulary):
    return spec.compile(vocabulary, backend="python")


def by_definition(grammar, data, vocabulary):
    """Every token on its own, through a fresh automaton that shares nothing with the grammar's."""
    fresh = automaton.ByteAutomaton(grammar.automaton.start)
    state = fresh.advance(fresh.start, data)
    allowed = [bool(t) and fresh.advance(state, t) is not None for t in vocabulary.tokens]
    allowed[vocabulary.eos_id] = state.nullable
    return np.flatnonzero(allowed)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_mask_is_what_each_token_gets_on_its_own(spec, vocabulary, tools):
    grammar, rng = python(spec, vocabulary), np.random.default_rng(0)
    checked = 0
    for _ in range(6):
        ids, _ = tools.walk(grammar, vocabulary, rng, most=12)
        matcher = grammar.matcher()
        for n in range(len(ids) + 1):
            expected = by_definition(grammar, tools.text_of(ids[:n], vocabulary), vocabulary)
            np.testing.assert_array_equal(tools.allowed(matcher, vocabulary), expected)
            checked += 1
            if n < len(ids):
                assert matcher.accept(ids[n])
    assert checked > 12


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_accept_is_what_the_mask_says(spec, vocabulary, tools):
    grammar, rng = python(spec, vocabulary), np.random.default_rng(1)
    ids, _ = tools.walk(grammar, vocabulary, rng, most=6)
    matcher = grammar.matcher()
    for token in ids:
        assert matcher.accept(token)
    allowed = set(tools.allowed(matcher, vocabulary).tolist())
    for token in range(-2, len(vocabulary.tokens) + 40):
        taken = matcher.accept(token)
        assert taken == (token in allowed)
        matcher.rollback(int(taken))
    assert set(tools.allowed(matcher, vocabulary).tolist()) == allowed


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rolling_back_is_never_having_accepted(spec, vocabulary, tools):
    grammar, rng = python(spec, vocabulary), np.random.default_rng(2)
    for _ in range(5):
        ids, ended = tools.walk(grammar, vocabulary, rng, most=10)
        ids += [vocabulary.eos_id] * ended
        there, masks = grammar.matcher(), []
        for token in ids:
            masks.append(tools.allowed(there, vocabulary).tolist())
            there.accept(token)
        assert there.is_done == ended
        back = int(rng.integers(len(ids) + 1))
        there.rollback(back)
        assert there.is_done == (ended and not back)
        for n in range(len(ids) - back, len(ids)):
            assert tools.allowed(there, vocabulary).tolist() == masks[n]
            assert there.accept(ids[n])
        with pytest.raises(InputError, match=rf"n={len(ids) + 1}.*{len(ids)} were accepted"):
            there.rollback(len(ids) + 1)
        with pytest.raises(InputError, match="n=-1"):
            there.rollback(-1)


@pytest.mark.parametrize(
    "spec",
    [
        Regex("(x|yy)🦌z"),
        JsonSchema({"const": {"k": [None]}}, whitespace=0),
        JsonSchema({"properties": {"q": {"type": "null"}}, "required": ["q"], "type": "object"}),
        Regex("[ab]{2,}🦌"),
    ],
    ids=str,
)
@pytest.mark.parametrize("merged", [False, True])
def test_forced_tokens_are_those_with_a_single_bit(spec, merged, vocabulary, tools):
    if not merged:  # One spelling for every text.
        tokens = tuple(t if t and len(t) == 1 else None for t in vocabulary.tokens)
        vocabulary = dataclasses.replace(vocabulary, tokens=tokens)
    grammar, rng = python(spec, vocabulary), np.random.default_rng(3)
    matcher, history, lengths = grammar.matcher(), [], []
    while not matcher.is_done:
        forced, alone = matcher.forced_tokens(), grammar.matcher()
        for token in history:
            alone.accept(token)
        for token in forced:
            assert tools.allowed(alone, vocabulary).tolist() == [token]
            assert alone.accept(token)
        assert alone.is_done or len(tools.allowed(alone, vocabulary)) > 1
        lengths.append(len(forced))
        history.append(int(rng.choice(tools.allowed(matcher, vocabulary))))
        assert matcher.accept(history[-1])
    assert any(lengths) and (merged or max(lengths) > 1)


def test_a_character_may_be_split_over_tokens(vocabulary, tools):
    grammar = python(Regex("🦌é"), vocabulary)
    whole, half, rest = ("🦌".encode(), "🦌".encode()[:2], "🦌".encode()[2:])
    ids = {t: i for i, t in enumerate(vocabulary.tokens) if t}
    matcher = grammar.matcher()
    assert tools.allowed(matcher, vocabulary).tolist() == sorted([whole[0], ids[half], ids[whole]])
    assert matcher.accept(ids[half])
    assert tools.allowed(matcher, vocabulary).tolist() == sorted([rest[0], ids[rest]])
    assert matcher.accept(rest[0]) and not matcher.accept(ids[rest])
    assert matcher.forced_tokens() == [rest[1]]  # Then "é", as one token or two.
    # Half a character in a token that goes on with something else.
    quoted = python(JsonSchema({"type": "string"}), vocabulary).matcher()
    tail = "é".encode()[1:] + b'"'
    assert all(map(quoted.accept, [ids[b'"'], "é".encode()[0], ids[tail], vocabulary.eos_id]))
    assert quoted.is_done


NEVER = [
    Regex(r"[^\s\S]"),
    Regex(r"x[^\s\S]+|[^\d\D]"),
    JsonSchema(False),
    JsonSchema({"enum": []}),
    JsonSchema({"type": "integer", "enum": ["a"]}),
    JsonSchema({"type": "string", "pattern": "^ab$", "maxLength": 1}),
    JsonSchema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
    JsonSchema({"type": "array", "minItems": 3, "maxItems": 2}),
    JsonSchema({"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
]


@pytest.mark.parametrize("spec", NEVER, ids=str)
def test_a_grammar_that_forbids_everything(spec, vocabulary, tools):
    matcher = python(spec, vocabulary).matcher()
    assert tools.allowed(matcher, vocabulary).tolist() == []
    assert not matcher.is_done and matcher.forced_tokens() == []
    assert not any(matcher.accept(t) for t in range(len(vocabulary.tokens)))


def test_after_the_end_nothing_follows(vocabulary, tools):
    matcher = python(Regex("a?"), vocabulary).matcher()
    assert matcher.accept(vocabulary.eos_id) and matcher.is_done
    assert not len(tools.allowed(matcher, vocabulary))
    assert not matcher.accept(ord("a")) and not matcher.accept(vocabulary.eos_id)


def test_without_an_end_of_sequence_a_text_is_done_when_no_byte_can_follow(tools):
    vocabulary = Vocabulary((b"a", b"b"))
    matcher = python(Regex("a*b?"), vocabulary).matcher()
    assert matcher.accept(0) and not matcher.is_done
    assert matcher.accept(1) and matcher.is_done and not len(tools.allowed(matcher, vocabulary))
    # Forced for ever, so told in parts.
    endless = python(Regex("a*"), Vocabulary((b"a", b"b"))).matcher()
    forced = endless.forced_tokens()
    assert forced and set(forced) == {0} and not endless.is_done


def test_rows_of_another_length_are_cut_or_filled_with_zeros(vocabulary):
    matcher = python(Json(), vocabulary).matcher()
    exact = np.zeros(vocabulary.num_words, np.int32)
    matcher.mask(exact)
    longer, shorter = np.full(len(exact) + 3, -1, np.int32), np.full(3, -1, np.int32)
    matcher.mask(longer)
    matcher.mask(shorter)
    np.testing.assert_array_equal(longer, [*exact, 0, 0, 0])
    np.testing.assert_array_equal(shorter, exact[:3])
    batch = np.full((2, len(exact)), -1, np.int32)
    matcher.mask(batch[1])  # A row of a batch is written in place.
    np.testing.assert_array_equal(batch, [[-1] * len(exact), exact])


@pytest.mark.parametrize("size", [1, 31, 32, 33, 70])
def test_bit_v_mod_32_of_word_v_div_32(size):
    allowed = np.random.default_rng(size).random(size) < 0.5
    words = pack(allowed)
    assert words.dtype == np.int32 and len(words) == -(-size // 32)
    for v in range(32 * len(words)):
        bit = (int(words[v // 32]) & 0xFFFFFFFF) >> (v % 32) & 1
        assert bit == (v < size and allowed[v])
    np.testing.assert_array_equal(unpack(words, size), allowed)
    assert not unpack(words, size + 64)[size:].any()
    assert pack(np.ones(64, bool)).tolist() == [-1, -1]


def test_dropping_all_that_was_kept_changes_nothing(vocabulary, tools, monkeypatch):
    def masks():
        grammar, rng = python(Json(), vocabulary), np.random.default_rng(4)
        return [tools.walk(grammar, vocabulary, rng, most=25) for _ in range(10)]

    expected = masks()
    monkeypatch.setattr(automaton, "_MASK_BYTES", 200)
    monkeypatch.setattr(automaton, "_MOST_STATES", 10)
    assert masks() == expected


def test_matchers_of_one_grammar_do_not_meet(vocabulary, tools):
    grammar = python(Json(), vocabulary)
    one, other = grammar.matcher(), grammar.matcher()
    before = tools.allowed(other, vocabulary).tolist()
    assert one.accept(ord("["))
    assert tools.allowed(other, vocabulary).tolist() == before
    assert tools.allowed(one, vocabulary).tolist() != before


def test_eos_outside_the_vocabulary_is_named():
    with pytest.raises(InputError, match=r"eos_id=3 .* 2 ids"):
        Vocabulary((b"a", b"b"), eos_id=3)
    with pytest.raises(InputError, match="eos_id=9"):
        Regex("a").compile(Vocabulary((b"a", b"b")), eos_id=9, backend="python")
