"""The parser and its automaton against Python's own `re`."""

import itertools
import random
import re

import pytest

from jaxalope.errors import InputError
from jaxalope.infer.grammar import characters as ch
from jaxalope.infer.grammar.automaton import ByteAutomaton
from jaxalope.infer.grammar.derivatives import Derivatives
from jaxalope.infer.grammar.regex import full_match, search

ATOMS = [
    *("a", "b", "é", "🦌", " ", "1", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", r"\.", r"\n"),
    *("[ab]", "[^a]", "[a-z1]", r"[^\w]", r"[\d_]", "[é-ü]", "[^-a]", "[]a]", r"[\]a-]", r"\xe9"),
    *(r"\u00e9", r"\U0001f98c", r"[\u0000-\uffff]", r"\-", "{", "a{x}", "}", "[^^]", r"[\b ]"),
]
QUANTIFIERS = ["", "", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "??", "{0}"]
TEXT = "ab1 _é🦌\n-ü.{}x]^\b"


def pattern(rng, depth):
    if depth == 0:
        return rng.choice(ATOMS)
    kind = rng.random()
    if kind < 0.25:
        opening = rng.choice(["(", "(?:", f"(?P<n{rng.randrange(10**6)}>"])
        return f"{opening}{pattern(rng, depth - 1)}|{pattern(rng, depth - 1)})"
    if kind < 0.5:
        return f"({pattern(rng, depth - 1)}){rng.choice(QUANTIFIERS)}"
    return "".join(pattern(rng, depth - 1) for _ in range(rng.randint(0, 3)))


def atoms_quantified(rng, source):
    return rng.choice(ATOMS[:22]) + rng.choice(QUANTIFIERS) + source


def accepts(automaton, text):
    state = automaton.advance(automaton.start, text.encode())
    return state is not None and state.nullable


def matching_text(expression, rng):
    """Some text that the automaton accepts, found by walking it; None where none was met."""
    derivatives, out = Derivatives(), bytearray()
    for _ in range(40):
        if expression.nullable and rng.random() < 0.4:
            return out.decode()  # Whatever is accepted is UTF-8.
        moves = derivatives.moves(expression)
        if not moves:
            return out.decode() if expression.nullable else None
        byte_set, expression = rng.choice(moves)
        out.append(rng.choice([b for b in range(256) if byte_set >> b & 1]))
    return None


@pytest.mark.parametrize("seed", range(4))
def test_random_patterns_match_what_re_matches(seed):
    rng = random.Random(seed)
    found = {True: 0, False: 0}
    for _ in range(150):
        source = atoms_quantified(rng, pattern(rng, rng.choice([1, 2, 3])))
        expression = full_match(source)
        automaton, oracle = ByteAutomaton(expression), re.compile(source, re.ASCII)
        texts = ["".join(rng.choices(TEXT, k=rng.randint(0, 5))) for _ in range(25)]
        texts += filter(None, (matching_text(expression, rng) for _ in range(10)))
        for text in texts:
            expected = oracle.fullmatch(text) is not None
            assert accepts(automaton, text) == expected, (source, text)
            found[expected] += 1
    assert min(found.values()) > 500


@pytest.mark.parametrize(
    ("source", "yes", "no"),
    [
        ("ab", ["ab", "xaby"], ["a b"]),
        ("^ab", ["ab", "abx"], ["xab"]),
        ("ab$", ["ab", "xab"], ["abx"]),
        ("^ab$", ["ab"], ["abx", "xab"]),
        ("^a|b$", ["ax", "xb", "b"], ["xa", "bx"]),
        ("", ["", "é"], []),
    ],
)
def test_search_finds_a_match_anywhere_unless_anchored(source, yes, no):
    automaton = ByteAutomaton(search(source))
    for text in yes + no:
        assert accepts(automaton, text) == (re.search(source, text) is not None) == (text in yes)


@pytest.mark.parametrize("source", ["^a$", "^ab|b$", "^$", "a|^b|c$"])
def test_anchors_at_the_ends_change_nothing_in_a_full_match(source):
    automaton = ByteAutomaton(full_match(source))
    for text in map("".join, itertools.product("abc", repeat=2)):
        assert accepts(automaton, text) == (re.fullmatch(source, text) is not None)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (r"(a)\1", "back references"),
        ("a(?=b)", "look-ahead"),
        ("(?<!a)b", "look-behind"),
        (r"\bword", "word boundaries"),
        (r"\p{L}", "Unicode properties"),
        ("(?i)a", "flags"),
        ("a++", "possessive"),
        ("(^a)", "top-level branch"),
        ("a$b", "top-level branch"),
        (r"\q", r"\\q"),
        (r"\x1", "hexadecimal"),
        ("a**", "cannot repeat another"),
        ("*a", "nothing to repeat"),
        ("(a", "not closed"),
        ("a)", "closes nothing"),
        ("[a", "not closed"),
        ("[", "not closed"),
        ("[b-a]", "lower character"),
        (r"[a-\d]", "lower character"),
        (r"[\d-a]", "from one character"),
        ("a{2,1}", "ends below"),
        ("a\\", "lone backslash"),
        ("\ud800", "half a character"),
        (r"\ud800", "half a character"),
        (r"\U00110000", "last character"),
    ],
)
def test_what_is_unsupported_or_wrong_is_named_with_its_place(source, named):
    with pytest.raises(InputError, match=r"character \d+.*") as caught:
        full_match(source)
    assert re.search(named, str(caught.value))


def test_sets_of_characters_are_exactly_their_utf8():
    rng = random.Random(0)
    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    for _ in range(60):
        points = sorted(rng.choice([*edges, rng.randrange(0x110000)]) for _ in range(4))
        chars = ch.characters([(points[0], points[1]), (points[2], points[3])])
        automaton, other = ByteAutomaton(ch.utf8(chars)), ByteAutomaton(ch.utf8(ch.negated(chars)))
        near = {p + d for p in points + edges for d in (-1, 0, 1)}
        for p in (p for p in near if 0 <= p < 0xD800 or 0xE000 <= p < 0x110000):
            inside = points[0] <= p <= points[1] or points[2] <= p <= points[3]
            assert accepts(automaton, chr(p)) == inside != accepts(other, chr(p))


@pytest.mark.parametrize(
    "data", [b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\x80"]
)
def test_what_is_not_utf8_begins_no_text(data):
    automaton = ByteAutomaton(full_match(r"[\s\S]*"))
    assert automaton.advance(automaton.start, data) is None
