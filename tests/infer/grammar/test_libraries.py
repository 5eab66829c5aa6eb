"""The libraries behind the same protocol; where they mean the same, the same masks."""

import dataclasses
import sys

import numpy as np
import pytest

from jaxalope.errors import InputError
from jaxalope.infer.grammar import Json, JsonSchema, LarkGrammar, Regex, Vocabulary

LIBRARIES = ["llguidance", "xgrammar"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "n": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"enum": ["é", "ab", 12]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["n", "tags"],
    "additionalProperties": False,
}
COMMON = [
    Regex("(a|ab|abc)+🦌?"),
    Regex(r"[^a\s]{1,3}\d*|é\w"),
    Regex("🦌{2}"),
    # Other languages, or errors, in Rust's own syntax: sets in classes, {,n}, octal zero, braces.
    Regex(r"[&&a]{,2}[a~~b][--a]"),
    Regex(r"[[a]a{}b|\0[\b]|{a}"),
    Json(),
    Json(whitespace=0),
    JsonSchema(SCHEMA, whitespace=2),
    JsonSchema({"type": "string", "pattern": '^[ab"]+é$'}),
    JsonSchema({"anyOf": [{"const": "ab"}, {"type": "number"}]}),
]


@pytest.fixture(params=LIBRARIES)
def library(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


@pytest.mark.parametrize("spec", COMMON, ids=str)
def test_llguidance_and_python_make_the_same_masks(spec, vocabulary, tools):
    pytest.importorskip("llguidance")
    # JSON that the library does not write: DEL as itself, and the escape "\/".
    tokens = tuple(None if t == b"\x7f" else t for t in vocabulary.tokens)
    vocabulary = dataclasses.replace(vocabulary, tokens=tokens)
    backslash = {i for i, t in enumerate(vocabulary.tokens) if t and t.endswith(b"\\")}
    theirs = spec.compile(vocabulary, backend="llguidance")
    grammar, rng = spec.compile(vocabulary, backend="python"), np.random.default_rng(0)
    states = 0
    for _ in range(25):
        ours, other, last = grammar.matcher(), theirs.matcher(), None
        for _ in range(30):
            expected = tools.allowed(ours, vocabulary).tolist()
            got = tools.allowed(other, vocabulary).tolist()
            if last in backslash and ord("/") in expected:
                expected.remove(ord("/"))
            assert got == expected
            states += 1
            if not expected:
                break
            last = int(rng.choice(expected))
            assert ours.accept(last) and other.accept(last)
            assert ours.is_done == other.is_done
    assert states > 60


NUMBERS = {
    "type": "object",
    "properties": {n: SCHEMA["properties"][n] for n in ("n", "tags")},
    "required": ["tags"],
    "additionalProperties": False,
}
LISTS = {"type": ["null", "array"], "items": {"type": "number"}}


# No free strings: xgrammar allows control characters and surrogates in them, which are not JSON.
@pytest.mark.parametrize(
    "spec",
    [
        Regex("(a|ab|abc)+🦌?"),
        JsonSchema(NUMBERS, whitespace=2),
        JsonSchema(LISTS, whitespace=0),
    ],
    ids=str,
)
def test_a_library_keeps_the_protocol(library, spec, vocabulary, tools):
    grammar, rng = spec.compile(vocabulary, backend=library), np.random.default_rng(1)
    oracle = spec.compile(vocabulary, backend="python").automaton
    ended = 0
    for _ in range(20):
        ids, done = tools.walk(grammar, vocabulary, rng, most=30)
        ended += done
        text = tools.text_of(ids, vocabulary)
        state = oracle.advance(oracle.start, text)
        assert state is not None and (state.nullable or not done)
        # Rolled back and gone again, masks are those of the first time.
        ids += [vocabulary.eos_id] * done
        matcher, masks = grammar.matcher(), []
        for token in ids:
            masks.append(tools.allowed(matcher, vocabulary).tolist())
            assert matcher.accept(token)
        back = int(rng.integers(len(ids) + 1))
        matcher.rollback(back)
        for n in range(len(ids) - back, len(ids)):
            assert tools.allowed(matcher, vocabulary).tolist() == masks[n]
            assert matcher.accept(ids[n])
        assert matcher.is_done == done
        with pytest.raises(InputError, match="rollback"):
            matcher.rollback(len(ids) + 1)
    assert ended


def test_a_library_refuses_what_its_mask_does_not_allow(library, vocabulary, tools):
    matcher = Regex("ab?").compile(vocabulary, backend=library).matcher()
    for _ in range(2):
        allowed = set(tools.allowed(matcher, vocabulary).tolist())
        for token in [-1, 0, ord("b"), *range(250, len(vocabulary.tokens) + 40)]:
            taken = matcher.accept(token)
            assert taken == (token in allowed)
            matcher.rollback(int(taken))
        assert matcher.accept(ord("a"))
        matcher.rollback(1)
    assert matcher.accept(ord("a")) and matcher.accept(ord("b"))
    assert matcher.forced_tokens() == [vocabulary.eos_id] and not matcher.is_done
    assert matcher.accept(vocabulary.eos_id) and matcher.is_done
    assert not len(tools.allowed(matcher, vocabulary)) and not matcher.accept(ord("a"))


def test_a_library_without_an_end_of_sequence(library, tools):
    vocabulary = Vocabulary((b"a", b"b"))
    matcher = Regex("a*b").compile(vocabulary, backend=library).matcher()
    assert tools.allowed(matcher, vocabulary).tolist() == [0, 1]
    assert matcher.accept(0) and not matcher.is_done and matcher.accept(1) and matcher.is_done


def test_a_library_and_a_grammar_that_forbids_everything(library, vocabulary, tools):
    matcher = Regex(r"[^\s\S]").compile(vocabulary, backend=library).matcher()
    assert not len(tools.allowed(matcher, vocabulary)) and not matcher.is_done
    with pytest.raises(InputError, match=f"{library} refuses"):
        JsonSchema(False).compile(vocabulary, backend=library)


def test_a_library_says_what_is_wrong(library, vocabulary):
    with pytest.raises(InputError, match=f"not closed|{library} refuses"):
        Regex("(a").compile(vocabulary, backend=library)
    with pytest.raises(InputError, match=f"{library} refuses"):
        LarkGrammar("start: /a/ missing").compile(vocabulary, backend=library)


def test_lark(library, vocabulary, tools):
    spec = LarkGrammar('start: "a" start "b" | "1"\n')
    grammar = spec.compile(vocabulary, backend=library)
    matcher = grammar.matcher()
    assert all(map(matcher.accept, b"aa1b")) and not matcher.accept(vocabulary.eos_id)
    assert matcher.accept(ord("b")) and matcher.accept(vocabulary.eos_id)


def test_lark_needs_a_library(vocabulary):
    with pytest.raises(InputError, match="needs a library: pip install"):
        LarkGrammar("start: /a/").compile(vocabulary, backend="python")


def test_llguidance_spells_what_is_forced_as_the_tokenizer_does(vocabulary, tools):
    pytest.importorskip("llguidance")
    ids = {t: i for i, t in enumerate(vocabulary.tokens) if t}

    def encode(text):  # "name" is one token, all else bytes.
        first, name, rest = text.partition("name")
        return [*first.encode(), *[ids[b"name"]] * bool(name), *rest.encode()]

    spelling = Vocabulary(vocabulary.tokens, vocabulary.eos_id, encode)
    schema = {"type": "object", "properties": {"name": {"type": "null"}}, "required": ["name"]}
    spec = JsonSchema(schema, whitespace=0)
    matcher = spec.compile(spelling, backend="llguidance").matcher()
    forced = matcher.forced_tokens()
    assert forced[:4] == [ord("{"), ord('"'), ids[b"name"], ord('"')]
    # A tokenizer that changes the text is not followed.
    changing = Vocabulary(
        vocabulary.tokens, vocabulary.eos_id, lambda text: [*b" " + text.encode()]
    )
    forced = spec.compile(changing, backend="llguidance").matcher().forced_tokens()
    assert tools.text_of(forced, vocabulary).startswith(b'{"name":')


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_an_error_with_the_remedy_or_passed_over(
    name, vocabulary, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"backend='{name}'.*pip install .*backend='python'"):
        Regex("a").compile(vocabulary, backend=name)
    monkeypatch.setattr("jaxalope.infer.grammar.specs.installed", lambda _: False)
    assert type(Regex("a").compile(vocabulary)).__name__ == "PythonGrammar"


def test_the_default_is_llguidance_where_it_is_installed(vocabulary):
    pytest.importorskip("llguidance")
    assert type(Regex("a").compile(vocabulary)).__name__ == "LLGuidanceGrammar"


def test_an_unknown_backend_is_named(vocabulary):
    with pytest.raises(
        InputError, match="backend='outlines' is unknown; use None, or one of 'llguidance'"
    ):
        Regex("a").compile(vocabulary, backend="outlines")
