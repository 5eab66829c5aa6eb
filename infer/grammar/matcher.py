"""What the sampler asks of a grammar: the protocols, and the format of a mask.

A mask row is int32 words: token `v` is allowed iff bit `v % 32` of word `v // 32` (as uint32) is
set, so a word of -1 allows 32 tokens. Tokens beyond the last word are forbidden. Masks are made on
the host, while the device runs the forward pass; the jitted sampler only applies them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...errors import InputError

# A chain of forced tokens ends where the text may end, but a vocabulary without an end of sequence
# can force for ever.
_MOST_FORCED = 256


class GrammarMatcher(Protocol):
    """Where one text stands in its grammar.

    Not thread-safe; matchers of one grammar may share caches.
    """

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow a complete text.

        So it is once the end of sequence was accepted; in a vocabulary without one, once the
        grammar allows no more bytes.
        """
        ...

    def mask(self, words: np.ndarray) -> None:
        """Writes which tokens may come next into one row.

        All zeros mean that none may: the text is done, or the grammar (with this vocabulary) leads
        nowhere. Bits beyond the vocabulary are zero; tokens beyond the row are left out.

        Args:
          words: int32 ``[W]``, overwritten.
        """
        ...

    def accept(self, token: int) -> bool:
        """Goes on by `token`. False, and nothing changes, where the mask does not allow it."""
        ...

    def rollback(self, n: int) -> None:
        """Takes back the last `n` accepted tokens.

        Raises:
          InputError: fewer than `n` were accepted, or `n` is negative.
        """
        ...

    def forced_tokens(self) -> list[int]:
        """Tokens that are each the only possibility, from here on, in order; maybe none.

        The last may be the end of sequence. A long chain may come in parts: accept these, and ask
        again.
        """
        ...


class Grammar(Protocol):
    """A grammar compiled for one vocabulary, to be shared by all requests that use it."""

    def matcher(self) -> GrammarMatcher:
        """A matcher at the beginning of a text: cheap, one a request."""
        ...


def pack(allowed: np.ndarray) -> np.ndarray:
    """Packs bool ``[V]`` into int32 words ``[ceil(V / 32)]``."""
    padded = np.pad(allowed, (0, -len(allowed) % 32))
    return np.packbits(padded, bitorder="little").view("<i4").astype(np.int32)


def unpack(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """Bool ``[vocab_size]`` from int32 words; False beyond the last word."""
    bits = np.unpackbits(np.ascontiguousarray(words, "<i4").view(np.uint8), bitorder="little")
    allowed = np.zeros(vocab_size, bool)
    allowed[: len(bits)] = bits[:vocab_size]
    return allowed


def copy_words(source: np.ndarray, words: np.ndarray) -> None:
    """Writes a mask into a row of another length: cut off, or filled up with zeros."""
    n = min(len(source), len(words))
    words[:n] = source[:n]
    words[n:] = 0


def forced_tokens(matcher: GrammarMatcher, num_words: int) -> list[int]:
    """`GrammarMatcher.forced_tokens` by asking for masks, as long as they have a single bit."""
    words, tokens = np.empty(num_words, np.int32), []
    while len(tokens) < _MOST_FORCED and not matcher.is_done:
        matcher.mask(words)
        (filled,) = np.nonzero(words)
        if len(filled) != 1:
            break
        bits = int(words[filled[0]]) & 0xFFFFFFFF
        if bits & (bits - 1):
            break
        tokens.append(int(filled[0]) * 32 + bits.bit_length() - 1)
        matcher.accept(tokens[-1])
    matcher.rollback(len(tokens))
    return tokens


def check_rollback(n: int, accepted: int) -> None:
    """Raises `InputError` unless `n` of `accepted` tokens can be taken back."""
    if not 0 <= n <= accepted:
        raise InputError(
            f"rollback of n={n} tokens: {accepted} were accepted; give 0 to {accepted}"
        )
