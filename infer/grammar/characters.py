"""Sets of Unicode characters, and their UTF-8 as byte expressions.

A set is a tuple of inclusive ranges of code points, sorted and apart. Surrogates are in no set:
they have no UTF-8, so that whatever is built from these sets is valid UTF-8.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from .expression import Expression, byte_range, choice, sequence

Characters = tuple[tuple[int, int], ...]

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, _LAST)


def characters(ranges: Iterable[tuple[int, int]]) -> Characters:
    """The union of inclusive ranges, which may overlap, in any order."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(_without_surrogates(ranges)):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def _without_surrogates(ranges):
    first, last = _SURROGATES
    for low, high in ranges:
        for a, b in ((low, min(high, first - 1)), (max(low, last + 1), high)):
            if a <= b:
                yield a, b


def of(text: str) -> Characters:
    """The characters of `text`."""
    return characters((ord(c), ord(c)) for c in text)


def negated(chars: Characters) -> Characters:
    """All characters that are not in `chars`."""
    edges = [-1, *(edge for pair in chars for edge in pair), _LAST + 1]
    return characters((a + 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True))


def common(left: Characters, right: Characters) -> Characters:
    """The characters in both sets."""
    return characters((max(a, c), min(b, d)) for a, b in left for c, d in right)


ALL = characters([(0, _LAST)])


@functools.lru_cache(maxsize=1024)
def utf8(chars: Characters) -> Expression:
    """The UTF-8 of one character of the set."""
    return choice(*(part for low, high in chars for part in _utf8_range(low, high)))


def _utf8_range(low: int, high: int) -> Iterable[Expression]:
    # Splits until every byte of the encoding ranges on its own; as in RE2 and Thompson's grep.
    for last in _LAST_OF_LENGTH:
        if low <= last < high:
            yield from _utf8_range(low, last)
            yield from _utf8_range(last + 1, high)
            return
    for n in range(1, len(chr(low).encode())):
        tail = (1 << (6 * n)) - 1
        if low & ~tail == high & ~tail:
            continue
        if low & tail:
            middle = low | tail
        elif high & tail != tail:
            middle = (high & ~tail) - 1
        else:
            continue
        yield from _utf8_range(low, middle)
        yield from _utf8_range(middle + 1, high)
        return
    yield sequence(*map(byte_range, chr(low).encode(), chr(high).encode()))
