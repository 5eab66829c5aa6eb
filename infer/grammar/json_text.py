"""The parts of JSON text (RFC 8259) as byte expressions: space, numbers, strings, arrays, objects.

Strings come in two forms. `any_character` allows every escape that stands for a character, so it
takes all valid strings but those with half a surrogate pair. `plain_character` writes each
character in one way only (itself, else the short escape, else `\\u00xx`), so that a pattern, or
"none of these keys", can be decided on the bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence as Many
from typing import Any

from .characters import ALL, Characters, characters, common, negated, of, utf8
from .expression import (
    EMPTY,
    NOTHING,
    Expression,
    byte_range,
    choice,
    literal,
    one_of,
    optional,
    repeat,
    sequence,
)

_MUST_ESCAPE = characters([(0, 0x1F), *of('"\\')])
_SHORT = {'"': b'\\"', "\\": b"\\\\", "\b": b"\\b", "\f": b"\\f", "\n": b"\\n"}
_SHORT |= {"\r": b"\\r", "\t": b"\\t"}

_DIGIT = byte_range(0x30, 0x39)
_HEX = one_of(b"0123456789abcdefABCDEF")
INTEGER = sequence(
    optional(literal(b"-")),
    choice(literal(b"0"), sequence(byte_range(0x31, 0x39), repeat(_DIGIT))),
)
"""Digits without a fraction or exponent; no leading zeros."""
NUMBER = sequence(
    INTEGER,
    optional(sequence(literal(b"."), repeat(_DIGIT, 1))),
    optional(sequence(one_of(b"eE"), optional(one_of(b"+-")), repeat(_DIGIT, 1))),
)
BOOLEAN = choice(literal(b"true"), literal(b"false"))
NULL = literal(b"null")


@functools.lru_cache(maxsize=1024)
def plain_character(chars: Characters) -> Expression:
    """One character of the set, each written in one way."""
    escaped = []
    for low, high in common(chars, _MUST_ESCAPE):
        for c in map(chr, range(low, high + 1)):
            escaped.append(literal(_SHORT.get(c) or f"\\u{ord(c):04x}".encode()))
    return choice(utf8(common(chars, negated(_MUST_ESCAPE))), *escaped)


@functools.cache
def any_character() -> Expression:
    """One character in any of its spellings; a pair of surrogate escapes is one character."""
    d, d_low, d_high = one_of(b"dD"), one_of(b"89abAB"), one_of(b"cdefCDEF")
    unit = choice(
        sequence(one_of(b"0123456789abcefABCEF"), _HEX, _HEX, _HEX),
        sequence(d, byte_range(0x30, 0x37), _HEX, _HEX),
        sequence(d, d_low, _HEX, _HEX, literal(b"\\u"), d, d_high, _HEX, _HEX),
    )
    return choice(
        utf8(common(ALL, negated(_MUST_ESCAPE))),
        sequence(literal(b"\\"), choice(one_of(b'"\\/bfnrt'), sequence(literal(b"u"), unit))),
    )


def quoted(content: Expression) -> Expression:
    """`content` between quotation marks."""
    return sequence(literal(b'"'), content, literal(b'"'))


def space(most: int) -> Expression:
    """Up to `most` characters of white space."""
    return repeat(one_of(b" \n\r\t"), 0, most)


def array(
    prefix: Many[Expression],
    item: Expression,
    low: int,
    high: int | None,
    space: Expression,
) -> Expression:
    """An array of `low` to `high` items: first those of `prefix`, in order, then any of `item`."""
    comma = sequence(space, literal(b","), space)
    prefix = (list(prefix) or [item])[:high]
    done = len(prefix)
    rest = repeat(sequence(comma, item), max(low - done, 0), None if high is None else high - done)
    for i in range(done - 1, 0, -1):
        rest = choice(EMPTY if i >= low else NOTHING, sequence(comma, prefix[i], rest))
    filled = sequence(prefix[0], rest) if prefix else NOTHING
    empty = sequence(literal(b"["), space, literal(b"]")) if low == 0 else NOTHING
    return choice(empty, sequence(literal(b"["), space, filled, space, literal(b"]")))


def pair(key: Expression, value: Expression, space: Expression) -> Expression:
    """A key (quotation marks included), a colon, a value."""
    return sequence(key, space, literal(b":"), space, value)


def object_(
    pairs: Many[tuple[Expression, bool]],
    more: Expression,
    space: Expression,
) -> Expression:
    """An object: `pairs` in order (each with: must it be there?), then any number of `more`."""
    comma = sequence(space, literal(b","), space)
    # What follows once a pair was written, and what comes where none was yet; right to left.
    after = repeat(sequence(comma, more))
    first = sequence(more, after)
    for one, required in reversed(pairs):
        first = choice(sequence(one, after), NOTHING if required else first)
        after = choice(sequence(comma, one, after), NOTHING if required else after)
    may_be_empty = not any(required for _, required in pairs)
    empty = sequence(literal(b"{"), space, literal(b"}")) if may_be_empty else NOTHING
    return choice(empty, sequence(literal(b"{"), space, first, space, literal(b"}")))


def string(text: str) -> Expression:
    """The string `text`, in its one plain form; raises ValueError for half a surrogate pair."""
    text.encode()
    return quoted(sequence(*(plain_character(of(c)) for c in text)))


def constant(value: Any, space: Expression) -> Expression:
    """The JSON value `value`; raises ValueError if it is none."""
    if isinstance(value, str):
        return string(value)
    if isinstance(value, list | tuple):
        items = [constant(item, space) for item in value]
        return array(items, NOTHING, len(items), len(items), space)
    if isinstance(value, dict):
        pairs = [(pair(string(k), constant(v, space), space), True) for k, v in value.items()]
        return object_(pairs, NOTHING, space)
    return literal(json.dumps(value, allow_nan=False).encode())
