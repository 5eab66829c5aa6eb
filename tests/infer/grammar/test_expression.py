"""Derivatives against sets of strings, written out."""

import itertools
import random

import pytest

from jaxalope.infer.grammar import automaton as automaton_module
from jaxalope.infer.grammar import expression as ex
from jaxalope.infer.grammar.automaton import ByteAutomaton
from jaxalope.infer.grammar.derivatives import Derivatives

LONGEST = 4
ALL = [bytes(s) for n in range(LONGEST + 1) for s in itertools.product(b"ab", repeat=n)]


def build(rng, depth):
    """A random expression, and its strings of at most LONGEST bytes of `ab`."""
    if depth == 0:
        return rng.choice(
            [
                (ex.NOTHING, set()),
                (ex.EMPTY, {b""}),
                (ex.literal(b"a"), {b"a"}),
                (ex.literal(b"ba"), {b"ba"}),
                (ex.one_of(b"ab"), {b"a", b"b"}),
            ]
        )
    kind = rng.choice(["sequence", "choice", "repeat", "both", "complement"])
    left, ours = build(rng, depth - 1)
    right, theirs = build(rng, depth - 1)
    if kind == "sequence":
        return ex.sequence(left, right), joined(ours, theirs)
    if kind == "choice":
        return ex.choice(left, right), ours | theirs
    if kind == "both":
        return ex.both(left, right), ours & theirs
    if kind == "complement":
        return ex.complement(left), set(ALL) - ours
    low, high = rng.choice([(0, None), (1, None), (0, 1), (2, 3), (1, 2), (0, 0), (2, 2)])
    strings, power = set(), {b""}
    # Beyond LONGEST copies nothing new is short enough, the empty string aside.
    for n in range((LONGEST + low if high is None else high) + 1):
        if n >= low:
            strings |= power
        power = joined(power, ours)
    return ex.repeat(left, low, high), strings


def joined(left, right):
    return {a + b for a in left for b in right if len(a + b) <= LONGEST}


@pytest.mark.parametrize("seed", range(4))
def test_random_expressions_have_the_strings_of_their_sets(seed):
    rng = random.Random(seed)
    nonempty = 0
    for _ in range(150):
        expression, strings = build(rng, rng.choice([1, 2, 3]))
        automaton = ByteAutomaton(expression)
        accepted = set()
        for s in ALL:
            state = automaton.advance(automaton.start, s)
            if state is not None and state.nullable:
                accepted.add(s)
            # No prefix of a string is without a way out, and no state but None is.
            assert state is not None or not any(t.startswith(s) for t in strings)
            assert state is None or Derivatives().alive(state)
        assert accepted == strings
        nonempty += bool(strings)
    assert nonempty > 75


def test_what_is_equal_is_one_object_and_what_is_empty_is_nothing():
    a, b = ex.literal(b"a"), ex.literal(b"b")
    assert ex.choice(a, b) is ex.choice(b, a, ex.NOTHING) is ex.one_of(b"ab")
    assert ex.sequence(ex.sequence(a, b), a) is ex.sequence(a, ex.sequence(b, a))
    assert ex.sequence(a, ex.NOTHING) is ex.NOTHING is ex.repeat(a, 2, 1)
    assert ex.repeat(ex.NOTHING) is ex.EMPTY and ex.repeat(ex.NOTHING, 1) is ex.NOTHING
    assert ex.complement(ex.complement(a)) is a


def test_an_empty_intersection_is_seen_before_it_is_entered():
    # After "a" only "b" or "c" could follow, never both: "a" must not be allowed at all.
    parts = (ex.any_of([b"ab", b"dd"]), ex.any_of([b"ac", b"dd"]))
    automaton = ByteAutomaton(ex.sequence(ex.both(*parts), ex.literal(b"!")))
    assert automaton.advance(automaton.start, b"a") is None
    assert automaton.advance(automaton.start, b"dd!") is ex.EMPTY
    nowhere = ex.both(ex.repeat(ex.literal(b"a"), 1), ex.repeat(ex.literal(b"b"), 1))
    assert ByteAutomaton(ex.sequence(ex.literal(b"x"), nowhere)).start is None


def test_a_rule_counts_without_a_bound_and_without_recursion(monkeypatch):
    monkeypatch.setattr(automaton_module, "_MOST_STATES", 500)  # Far fewer than there are depths.
    nested = ex.Rule("nested")
    nested.define(
        ex.choice(ex.literal(b"x"), ex.sequence(ex.literal(b"("), nested, ex.literal(b")")))
    )
    automaton = ByteAutomaton(nested)
    deep = automaton.advance(automaton.start, b"(" * 5000 + b"x")
    assert automaton.advance(deep, b")" * 4999).nullable is False
    assert automaton.advance(deep, b")" * 5000) is ex.EMPTY
    assert automaton.advance(deep, b")" * 5001) is None
