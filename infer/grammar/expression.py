"""Languages of byte strings as expressions: what a grammar is made of, before it is run.

An expression is immutable and interned: equal expressions are one object, so that they compare by
identity and serve as the states of an automaton. The functions at the end build them and simplify
as they build; nothing else should. `Rule` is a named expression that may contain itself, which
makes the languages context-free: the tail of a `Sequence` is the stack of the pushdown automaton
that `derivatives.py` runs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable

_SERIAL = itertools.count()
_INTERNED: weakref.WeakValueDictionary[tuple, Expression] = weakref.WeakValueDictionary()


class Expression:
    """A set of byte strings.

    Attributes:
      nullable: whether the empty string is in it.
      plain: whether it is certain to have a string, `NOTHING` aside. What has no string simplifies
        to `NOTHING` as it is built, except where a `Both` or `Complement` is inside: to see that
        takes a search.
      serial: in the order of building; sorts the branches of a `Choice`.
    """

    __slots__ = ("__weakref__", "nullable", "plain", "serial")

    def _finish(self, nullable: bool, plain: bool) -> None:
        self.nullable, self.plain, self.serial = nullable, plain, next(_SERIAL)


class Nothing(Expression):
    """No string at all."""

    __slots__ = ()


class Empty(Expression):
    """The empty string."""

    __slots__ = ()


class Byte(Expression):
    """One byte of a set: bit `b` of the integer `allowed` says whether byte `b` is in it."""

    __slots__ = ("allowed",)


class Sequence(Expression):
    """A string of `head` (never itself a `Sequence`), then one of `tail`."""

    __slots__ = ("head", "tail")


class Choice(Expression):
    """A string of any of `branches`."""

    __slots__ = ("branches",)


class Repeat(Expression):
    """`low` to `high` strings of `body`, one after another; `high` None has no end."""

    __slots__ = ("body", "high", "low")


class Both(Expression):
    """A string that is in `left` and in `right`. Neither may contain a `Rule`."""

    __slots__ = ("left", "right")


class Complement(Expression):
    """A string that is not in `body`, which may not contain a `Rule`."""

    __slots__ = ("body",)


class Rule(Expression):
    """An expression by name, so that it can contain itself; never nullable, never interned.

    Whoever builds one sees to it that it has a string, and that no string of it begins with itself.
    """

    __slots__ = ("body", "name")

    def __init__(self, name: str):
        self.name = name
        self.body: Expression = NOTHING
        self._finish(nullable=False, plain=True)

    def define(self, body: Expression) -> None:
        """Sets what the name stands for; `body` must not be nullable."""
        assert not body.nullable, f"rule {self.name} would be nullable"
        self.body = body


def _interned(kind: type, nullable: bool, plain: bool, **parts) -> Expression:
    key = (kind, *parts.values())
    found = _INTERNED.get(key)
    if found is None:
        found = kind()
        for name, part in parts.items():
            setattr(found, name, part)
        found._finish(nullable, plain)
        _INTERNED[key] = found
    return found


NOTHING = _interned(Nothing, nullable=False, plain=True)
EMPTY = _interned(Empty, nullable=True, plain=True)
ALL_BYTES = (1 << 256) - 1


def byte_set(allowed: int) -> Expression:
    """One byte `b` with bit `b` of `allowed` set."""
    return _interned(Byte, False, True, allowed=allowed) if allowed else NOTHING


def byte_range(low: int, high: int) -> Expression:
    """One byte from `low` to `high`, both included."""
    return byte_set(((1 << (high - low + 1)) - 1) << low)


def one_of(data: bytes) -> Expression:
    """One byte of those in `data`."""
    return byte_set(sum(1 << b for b in set(data)))


def literal(data: bytes) -> Expression:
    """Exactly `data`."""
    return sequence(*(byte_set(1 << b) for b in data))


def sequence(*parts: Expression) -> Expression:
    """Strings of the parts, one after another."""
    if NOTHING in parts:
        return NOTHING
    result = EMPTY
    for part in reversed(parts):
        result = _before(part, result)
    return result


def _before(part: Expression, tail: Expression) -> Expression:
    # Only the spine of `part` is linked anew: `tail` may be a deep stack.
    if part is EMPTY or tail is EMPTY:
        return tail if part is EMPTY else part
    heads = []
    while isinstance(part, Sequence):
        heads.append(part.head)
        part = part.tail
    for head in (part, *reversed(heads)):
        nullable, plain = head.nullable and tail.nullable, head.plain and tail.plain
        tail = _interned(Sequence, nullable, plain, head=head, tail=tail)
    return tail


def choice(*branches: Expression) -> Expression:
    """Strings of any of the branches."""
    allowed, others = 0, set()
    for branch in branches:
        for part in branch.branches if isinstance(branch, Choice) else (branch,):
            if isinstance(part, Byte):
                allowed |= part.allowed
            elif part is not NOTHING:
                others.add(part)
    if allowed:
        others.add(byte_set(allowed))
    if ANYTHING in others:
        return ANYTHING
    if EMPTY in others and any(part.nullable for part in others - {EMPTY}):
        others.remove(EMPTY)
    if len(others) < 2:
        return others.pop() if others else NOTHING
    ordered = tuple(sorted(others, key=lambda part: part.serial))
    nullable, plain = any(p.nullable for p in ordered), all(p.plain for p in ordered)
    return _interned(Choice, nullable, plain, branches=ordered)


def repeat(body: Expression, low: int = 0, high: int | None = None) -> Expression:
    """From `low` to `high` strings of `body`; `high` None has no end."""
    if high is not None and high < low:
        return NOTHING
    if high == 0 or body is EMPTY:
        return EMPTY
    if body is NOTHING:
        return EMPTY if low == 0 else NOTHING
    if body.nullable:
        low = 0  # The same language, and the derivative needs no case for it.
    if low == high == 1:
        return body
    return _interned(Repeat, low == 0 or body.nullable, body.plain, body=body, low=low, high=high)


def optional(body: Expression) -> Expression:
    """`body`, or the empty string."""
    return choice(EMPTY, body)


def both(left: Expression, right: Expression) -> Expression:
    """Strings in `left` and in `right`."""
    if left.serial > right.serial:
        left, right = right, left
    if left is right or right is ANYTHING:
        return left
    if left is ANYTHING:
        return right
    if NOTHING in (left, right):
        return NOTHING
    return _interned(Both, left.nullable and right.nullable, False, left=left, right=right)


def complement(body: Expression) -> Expression:
    """Strings that are not in `body`."""
    if isinstance(body, Complement):
        return body.body
    return _interned(Complement, not body.nullable, False, body=body)


def difference(left: Expression, right: Expression) -> Expression:
    """Strings of `left` that are not in `right`."""
    return both(left, complement(right))


def any_of(parts: Iterable[bytes]) -> Expression:
    """Exactly one of `parts`."""
    return choice(*map(literal, parts))


ANYTHING = complement(NOTHING)
"""Every byte string."""
