"""The bytes of every token of a vocabulary, and the trie in which a grammar meets them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from ...data.tokenizers import Tokenizer
from ...errors import InputError

# A text that asks of a tokenizer what a grammar will: to write given bytes, and only these.
_PROBE = '{"name": ["ï\\n", -1.5e3, true]}'


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a grammar needs to know of a tokenizer.

    Attributes:
      tokens: the bytes of every token id; None for ids that stand for no text (special tokens,
        gaps). A grammar never allows these, the end of sequence aside.
      eos_id: the token that ends a text, or None: texts then end for other reasons only.
      encode: token ids of a text, with exactly its bytes; or None. A library that forces tokens
        (llguidance) spells what is forced as this does; without it every spelling stays allowed.
    """

    tokens: tuple[bytes | None, ...]
    eos_id: int | None = None
    encode: Callable[[str], Sequence[int]] | None = None

    def __post_init__(self):
        if self.eos_id is None:
            return
        if not 0 <= self.eos_id < len(self.tokens):
            raise InputError(
                f"eos_id={self.eos_id} is outside the vocabulary of {len(self.tokens)} ids; give "
                "the tokenizer's eos_id, or None"
            )
        tokens = (*self.tokens[: self.eos_id], None, *self.tokens[self.eos_id + 1 :])
        object.__setattr__(self, "tokens", tokens)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of one of the tokenizers of `data`.

        Raises:
          InputError: the bytes of its tokens depend on their neighbours (WordPiece, for one).
        """
        tokens = tuple(tokenizer.token_bytes())
        spelled = b"".join(tokens[i] or b"" for i in tokenizer.encode(_PROBE))
        # SentencePiece, for one, puts a space in front of what it encodes.
        encode = tokenizer.encode if spelled == _PROBE.encode() else None
        return cls(tokens, tokenizer.eos_id, encode)

    @property
    def num_words(self) -> int:
        """Length of a mask: `ceil(len(tokens) / 32)` words."""
        return -(-len(self.tokens) // 32)

    @functools.cached_property
    def trie(self) -> Trie:
        """The trie of all tokens that have bytes."""
        return Trie.build(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Trie:
    """Byte strings by their common beginnings, level by level; level 0 is the root alone.

    Attributes:
      levels: for each level from 1 on, the parent of every node (its index in the level above) and
        the byte that leads to it: int32 and uint8 arrays of one length.
      node_of_token: int32, where each token ends: its node's number, counted through all levels
        from 1 on; `num_nodes` for a token without bytes.
      num_nodes: nodes in all levels, the root left out.
    """

    levels: tuple[tuple[np.ndarray, np.ndarray], ...]
    node_of_token: np.ndarray
    num_nodes: int

    @classmethod
    def build(cls, tokens: Sequence[bytes | None]) -> Trie:
        """Builds the trie; None and the empty string are in none of its nodes."""
        lengths = np.array([len(t or b"") for t in tokens], np.int64)
        data = np.frombuffer(b"".join(t or b"" for t in tokens), np.uint8)
        starts = np.cumsum(lengths) - lengths
        ends = np.full(len(tokens), -1, np.int64)
        levels, total = [], 0
        token = np.flatnonzero(lengths)
        node = np.zeros(len(token), np.int64)  # Of each of these tokens, in the level above.
        depth = 0
        while len(token):
            edge = node * 256 + data[starts[token] + depth]
            edges, node = np.unique(edge, return_inverse=True)
            levels.append(((edges // 256).astype(np.int32), (edges % 256).astype(np.uint8)))
            depth += 1
            last = lengths[token] == depth
            ends[token[last]] = node[last] + total
            token, node = token[~last], node[~last]
            total += len(edges)
        ends[ends < 0] = total
        return cls(tuple(levels), ends.astype(np.int32), total)
