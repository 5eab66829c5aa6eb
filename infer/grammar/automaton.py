"""The matcher in Python: expressions, determinised where texts go, against the trie of all tokens.

A state is the expression of what may still come, so stacks of any depth are states like others.
A mask is found by walking the trie level by level: the state of every node is one look-up in the
table of transitions, for all nodes of a level at once. Masks and transitions are kept for each
state that was ever asked for; when they become many, all are dropped and found anew.
"""

from __future__ import annotations

import numpy as np

from .derivatives import Derivatives
from .expression import Expression
from .matcher import check_rollback, copy_words, forced_tokens, pack
from .vocabulary import Trie, Vocabulary

_MOST_STATES = 1 << 14  # 1 KiB each.
_MASK_BYTES = 1 << 26


class ByteAutomaton:
    """Deterministic automaton over bytes of an expression; None is the state of no way out."""

    def __init__(self, expression: Expression):
        self._clear()
        self.start = expression if self._derivatives.alive(expression) else None

    def advance(self, state: Expression | None, data: bytes) -> Expression | None:
        """The state after `data`."""
        self._bound()
        number = self._number(state)
        for byte in data:
            number = self._row(number)[byte]
        return self._states[number]

    def is_final(self, state: Expression | None) -> bool:
        """Whether no byte may follow."""
        return state is None or not self._row(self._number(state)).any()

    def reached(self, state: Expression | None, trie: Trie) -> np.ndarray:
        """Bool ``[num_nodes + 1]``: the trie's nodes that `state` allows; the last is False."""
        self._bound()
        reached = np.zeros(trie.num_nodes + 1, bool)
        at, end = np.array([self._number(state)], np.int32), 0
        for parent, byte in trie.levels:
            self._fill(at)
            at = self._table[at[parent], byte]
            start, end = end, end + len(byte)
            np.not_equal(at, 0, out=reached[start:end])
            if not reached[start:end].any():
                break
        return reached

    def _clear(self) -> None:
        self._derivatives = Derivatives()
        self._states: list[Expression | None] = [None]
        self._numbers: dict[Expression | None, int] = {None: 0}
        self._table = np.zeros((64, 256), np.int32)
        self._filled = np.zeros(64, bool)
        self._filled[0] = True

    def _bound(self) -> None:
        if len(self._states) > _MOST_STATES:
            self._clear()

    def _number(self, state: Expression | None) -> int:
        number = self._numbers.get(state)
        if number is None:
            number = self._numbers[state] = len(self._states)
            self._states.append(state)
            if number == len(self._filled):
                self._table = np.concatenate([self._table, np.zeros_like(self._table)])
                self._filled = np.concatenate([self._filled, np.zeros_like(self._filled)])
        return number

    def _fill(self, numbers: np.ndarray) -> None:
        seen = np.zeros(len(self._states), bool)
        seen[numbers] = True
        for number in np.flatnonzero(seen & ~self._filled[: len(seen)]):
            self._row(int(number))

    def _row(self, number: int) -> np.ndarray:
        if not self._filled[number]:
            for allowed, rest in self._derivatives.moves(self._states[number]):
                if self._derivatives.alive(rest):
                    bits = np.frombuffer(allowed.to_bytes(32, "little"), np.uint8)
                    target = self._number(rest)
                    self._table[number, np.unpackbits(bits, bitorder="little") == 1] = target
            self._filled[number] = True
        return self._table[number]


class PythonGrammar:
    """A `Grammar` that needs no library."""

    def __init__(self, expression: Expression, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.automaton = ByteAutomaton(expression)
        self._masks: dict[Expression | None, np.ndarray] = {}

    def matcher(self) -> PythonMatcher:
        """A matcher at the beginning of a text."""
        return PythonMatcher(self)

    def words(self, state: Expression | None) -> np.ndarray:
        """The mask of a state: int32 ``[ceil(V / 32)]``, not to be written to."""
        found = self._masks.get(state)
        if found is None:
            vocabulary = self.vocabulary
            trie = vocabulary.trie
            allowed = self.automaton.reached(state, trie)[trie.node_of_token]
            if vocabulary.eos_id is not None and state is not None:
                allowed[vocabulary.eos_id] = state.nullable
            found = pack(allowed)
            if (len(self._masks) + 1) * found.nbytes > _MASK_BYTES:
                self._masks.clear()
            self._masks[state] = found
        return found


class _Ended:
    """The state after the end of sequence."""


_ENDED = _Ended()


class PythonMatcher:
    """A `GrammarMatcher` over a `PythonGrammar`."""

    def __init__(self, grammar: PythonGrammar):
        self._grammar = grammar
        self._states: list[Expression | _Ended | None] = [grammar.automaton.start]

    @property
    def is_done(self) -> bool:
        """See `GrammarMatcher`."""
        state = self._states[-1]
        if state is _ENDED or self._grammar.vocabulary.eos_id is not None:
            return state is _ENDED
        return state is not None and state.nullable and self._grammar.automaton.is_final(state)

    def mask(self, words: np.ndarray) -> None:
        """See `GrammarMatcher`."""
        state = self._states[-1]
        if state is _ENDED:
            words[:] = 0
        else:
            copy_words(self._grammar.words(state), words)

    def accept(self, token: int) -> bool:
        """See `GrammarMatcher`."""
        state, vocabulary = self._states[-1], self._grammar.vocabulary
        if state is _ENDED or state is None or not 0 <= token < len(vocabulary.tokens):
            return False
        if token == vocabulary.eos_id:
            after = _ENDED if state.nullable else None
        else:
            data = vocabulary.tokens[token]
            after = self._grammar.automaton.advance(state, data) if data else None
        if after is None:
            return False
        self._states.append(after)
        return True

    def rollback(self, n: int) -> None:
        """See `GrammarMatcher`."""
        check_rollback(n, len(self._states) - 1)
        del self._states[len(self._states) - n :]

    def forced_tokens(self) -> list[int]:
        """See `GrammarMatcher`."""
        return forced_tokens(self, self._grammar.vocabulary.num_words)
