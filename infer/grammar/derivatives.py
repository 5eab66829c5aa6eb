"""How an expression moves: what remains of its language after a byte.

Brzozowski, "Derivatives of regular expressions", J. ACM 11 (1964), with the bytes taken in sets, so
that one derivation covers all 256. An expression and its derivatives are the states of a
deterministic automaton that is only ever built where somebody goes.
"""

from __future__ import annotations

from collections.abc import Iterable

from .expression import (
    ALL_BYTES,
    ANYTHING,
    EMPTY,
    NOTHING,
    Both,
    Byte,
    Choice,
    Complement,
    Empty,
    Expression,
    Nothing,
    Repeat,
    Rule,
    Sequence,
    both,
    choice,
    complement,
    repeat,
    sequence,
)

Moves = tuple[tuple[int, Expression], ...]
"""Disjoint sets of bytes (as `Byte.allowed`), each with what remains; no other byte may follow."""


class Derivatives:
    """Derivatives of expressions, remembered."""

    def __init__(self):
        self._moves: dict[Expression, Moves] = {}
        self._alive: dict[Expression, bool] = {}

    def moves(self, node: Expression) -> Moves:
        """What remains of `node` after each byte. Some of it may have no string: see `alive`."""
        found = self._moves.get(node)
        if found is None:
            found = self._moves[node] = self._derive(node)
        return found

    def _derive(self, node: Expression) -> Moves:
        match node:
            case Nothing() | Empty():
                return ()
            case Byte(allowed=allowed):
                return ((allowed, EMPTY),)
            case Rule(body=body):
                return self.moves(body)
            case Choice(branches=branches):
                return _union(move for branch in branches for move in self.moves(branch))
            case Sequence():
                return _union(self._along(node))
            case Repeat(body=body, low=low, high=high):
                more = repeat(body, max(low - 1, 0), None if high is None else high - 1)
                return tuple((s, sequence(rest, more)) for s, rest in self.moves(body))
            case Both(left=left, right=right):
                return _union(
                    (s & t, both(a, b))
                    for s, a in self.moves(left)
                    for t, b in self.moves(right)
                    if s & t
                )
            case Complement(body=body):
                moves = self.moves(body)
                others = ALL_BYTES & ~sum(s for s, _ in moves)
                return _union([*((s, complement(rest)) for s, rest in moves), (others, ANYTHING)])
        raise AssertionError(f"unknown expression {type(node).__name__}")

    def _along(self, node: Expression) -> Iterable[tuple[int, Expression]]:
        # A loop, not a recursion: there may be any number of heads that can be empty.
        while isinstance(node, Sequence):
            for allowed, rest in self.moves(node.head):
                yield allowed, sequence(rest, node.tail)
            if not node.head.nullable:
                return
            node = node.tail
        yield from self.moves(node)

    def alive(self, node: Expression) -> bool:
        """Whether any string at all is in `node`."""
        # A loop along the tail, not a recursion: the tail is a stack of any depth.
        passed = []
        while True:
            if node is NOTHING or node.plain or node in self._alive:
                answer = node is not NOTHING and (node.plain or self._alive[node])
                break
            passed.append(node)
            if not isinstance(node, Sequence):
                answer = self._search(node)
                break
            if not self.alive(node.head):
                answer = False
                break
            node = node.tail
        self._alive.update(dict.fromkeys(passed, answer))
        return answer

    def _search(self, node: Expression) -> bool:
        if isinstance(node, Choice):
            return any(map(self.alive, node.branches))
        if isinstance(node, Repeat):
            return node.nullable or self.alive(node.body)
        # `Both` and `Complement` are regular: finitely many derivatives, searched breadth first
        # for one that is nullable.
        came_from: dict[Expression, Expression | None] = {node: None}
        queue = [node]
        for here in queue:
            if here.nullable or self._alive.get(here):
                step: Expression | None = here
                while step is not None:
                    self._alive[step] = True
                    step = came_from[step]
                return True
            for _, rest in self.moves(here):
                if rest not in came_from and self._alive.get(rest) is not False:
                    came_from[rest] = here
                    queue.append(rest)
        self._alive.update(dict.fromkeys(came_from, False))
        return False


def _union(moves: Iterable[tuple[int, Expression]]) -> Moves:
    """Makes the sets of bytes disjoint; where several overlap, any of the remainders may follow."""
    by_set: dict[int, list[Expression]] = {}
    for allowed, rest in moves:
        if allowed and rest is not NOTHING:
            by_set.setdefault(allowed, []).append(rest)
    regions: list[tuple[int, list[Expression]]] = []
    for allowed, rests in by_set.items():
        split = []
        for region, others in regions:
            if region & allowed:
                split.append((region & allowed, others + rests))
            if region & ~allowed:
                split.append((region & ~allowed, others))
            allowed &= ~region
        if allowed:
            split.append((allowed, rests))
        regions = split
    by_rest: dict[Expression, int] = {}
    for allowed, rests in regions:
        rest = choice(*rests)
        by_rest[rest] = by_rest.get(rest, 0) | allowed
    return tuple((allowed, rest) for rest, allowed in by_rest.items())
