"""Stages that push, require or forbid given tokens: bias, bad words, a least length, a grammar.

What a row lists is padded to a power of two, and in a batch to its longest list, so that few widths
are ever compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..errors import InputError
from .policy import Policy, check, needed, policy
from .rows import (
    NO_TOKEN,
    check_vocabulary,
    per_row,
    power_of_two,
    row_map,
    token_ids,
    widened,
)

_ANY = -1


@policy()
class LogitBias(Policy):
    """Adds a number to the logits of given tokens: ``LogitBias({17: -2.0, 4: 5.0})``.

    Attributes:
        ids: a mapping of token ids to numbers; or arrays as they are kept, ``[S]`` or ``[B, S]``.
        values: of such ids; ``-inf`` forbids a token.
    """

    ids: Any
    values: Any = None
    can_starve: ClassVar[bool] = True
    rank: ClassVar[int] = 10

    def __post_init__(self):
        if isinstance(self.ids, Mapping):
            ids = token_ids("logit_bias", list(self.ids))
            try:
                values = np.asarray(list(self.ids.values()), np.float32)
            except (TypeError, ValueError):
                raise InputError(f"logit_bias={self.ids} must map ids to numbers") from None
            width = power_of_two(len(ids))
            object.__setattr__(self, "ids", widened(ids, [width], NO_TOKEN))
            object.__setattr__(self, "values", widened(values, [width], 0.0))
        elif self.values is None:
            raise InputError("logit_bias has ids without values; give a mapping of ids to numbers")
        remedy = "must be finite, or -inf to forbid a token"
        check(lambda x: np.asarray(x) < np.inf, "logit_bias", self.values, remedy)

    def check_vocabulary(self, vocab_size):
        """Raise InputError for a token beyond the vocabulary."""
        check_vocabulary("logit_bias", self.ids, vocab_size)

    @classmethod
    def neutral(cls) -> LogitBias:
        """No token."""
        return cls({})

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """As :meth:`Policy.stack`, all as wide as the widest."""
        (width,) = _widest([stage.ids for stage in stages])
        return super().stack(
            [
                cls(widened(s.ids, [width], NO_TOKEN), widened(s.values, [width], 0.0))
                for s in stages
            ]
        )

    def __call__(self, logits, context=None):
        """Logits plus the bias."""

        def add(logits, ids, values):
            rows = jnp.arange(len(logits))[:, None]
            return logits.at[rows, ids].add(values.astype(logits.dtype), mode="drop")

        batch = len(logits)
        return row_map(add, logits, per_row(self.ids, batch, 1), per_row(self.values, batch, 1))


@policy()
class BadWords(Policy):
    """Forbids to complete a sequence of tokens: its last one, where the row ends with the others.

    A sequence of one token is never drawn. The row is prompt and output.

    Attributes:
        sequences: lists of token ids; or as they are kept, ``[W, L]`` or ``[B, W, L]``: each at the
            end of its row with -1 before it.
    """

    sequences: Any
    needs: ClassVar[frozenset[str]] = frozenset({"context"})
    can_starve: ClassVar[bool] = True
    rank: ClassVar[int] = 12

    def __post_init__(self):
        if isinstance(self.sequences, list | tuple):
            words = [token_ids("bad_words", word) for word in self.sequences]
            if any(not len(word) for word in words):
                raise InputError(f"bad_words={self.sequences} has an empty sequence; leave it out")
            shape = [power_of_two(len(words)), power_of_two(max(map(len, words), default=1))]
            padded = np.full(shape, _ANY, np.int32)
            for row, word in zip(padded, words, strict=False):
                row[len(row) - len(word) :] = word
            object.__setattr__(self, "sequences", padded)

    def check_vocabulary(self, vocab_size):
        """Raise InputError for a token beyond the vocabulary."""
        check_vocabulary("bad_words", self.sequences, vocab_size)

    @classmethod
    def neutral(cls) -> BadWords:
        """No sequence."""
        return cls([])

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """As :meth:`Policy.stack`, all as wide as the widest."""
        count, length = _widest([stage.sequences for stage in stages])

        def wide(words):
            longer = [(0, count - words.shape[0]), (length - words.shape[1], 0)]
            return cls(np.pad(words, longer, constant_values=_ANY))

        return super().stack([wide(stage.sequences) for stage in stages])

    def __call__(self, logits, context=None):
        """``-inf`` at the last tokens of the sequences that the row has begun."""
        context = needed(context, self)

        def forbid(logits, tokens, length, words):
            begun, last = words[..., :-1], words[..., -1]
            at = length[:, None] - begun.shape[-1] + jnp.arange(begun.shape[-1])
            end = jnp.take_along_axis(tokens, jnp.maximum(at, 0), axis=1)
            same = (begun == end[:, None]) & (at >= 0)[:, None]
            complete = jnp.all(same | (begun == _ANY), axis=-1) & (last != _ANY)
            rows = jnp.arange(len(logits))[:, None]
            forbidden = jnp.where(complete, last, NO_TOKEN)
            return logits.at[rows, forbidden].set(-jnp.inf, mode="drop")

        words = per_row(self.sequences, len(logits), 2)
        return row_map(forbid, logits, context.tokens, context.length, words)


@policy()
class MinNewTokens(Policy):
    """Forbids the tokens that end a row until it has ``count`` new ones.

    Attributes:
        count: of new tokens, not negative.
        stop_tokens: ids that end a row: one, a list, or ``[B, S]``.
    """

    count: Any
    stop_tokens: Any
    needs: ClassVar[frozenset[str]] = frozenset({"context"})
    can_starve: ClassVar[bool] = True
    rank: ClassVar[int] = 20

    def __post_init__(self):
        check(
            lambda n: (np.mod(n, 1) == 0) & (np.asarray(n) >= 0),
            "min_new_tokens",
            self.count,
            "must be a whole number of tokens, not negative",
        )
        if isinstance(self.stop_tokens, int | list | tuple | np.generic | str | None):
            ids = token_ids("stop_tokens", self.stop_tokens)
            width = power_of_two(len(ids))
            object.__setattr__(self, "stop_tokens", widened(ids, [width], NO_TOKEN))

    def check_vocabulary(self, vocab_size):
        """Raise InputError for a token beyond the vocabulary."""
        check_vocabulary("stop_tokens", self.stop_tokens, vocab_size)

    @classmethod
    def neutral(cls) -> MinNewTokens:
        """Nothing is required."""
        return cls(0, ())

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """As :meth:`Policy.stack`, all as wide as the widest."""
        width = _widest([stage.stop_tokens for stage in stages])
        return super().stack(
            [cls(s.count, widened(s.stop_tokens, width, NO_TOKEN)) for s in stages]
        )

    def __call__(self, logits, context=None):
        """``-inf`` at the stop tokens of rows that are too short."""
        context = needed(context, self)

        def forbid(logits, new, count, ids):
            rows = jnp.arange(len(logits))[:, None]
            forbidden = jnp.where((new < count)[:, None], ids, NO_TOKEN)
            return logits.at[rows, forbidden].set(-jnp.inf, mode="drop")

        batch = len(logits)
        new = context.length - context.prompt_length
        return row_map(
            forbid, logits, new, per_row(self.count, batch), per_row(self.stop_tokens, batch, 1)
        )


@policy()
class GrammarMask(Policy):
    """Allows the tokens whose bit is set: of token ``v``, bit ``v % 32`` of word ``v // 32``.

    A hard constraint: a row that starves gets the likeliest of the tokens that it allows.

    Attributes:
        words: int32 ``[W]`` or ``[B, W]``, ``W = ceil(V / 32)``; a word of -1 allows its 32 tokens,
            and tokens beyond the words are forbidden.
        enabled: False leaves a row as it is.
    """

    words: Any
    enabled: Any = True
    can_starve: ClassVar[bool] = True
    rank: ClassVar[int] = 15

    def __post_init__(self):
        dtype = getattr(self.words, "dtype", np.dtype(np.int32))
        if not np.issubdtype(dtype, np.integer):
            raise InputError(f"grammar words of dtype {dtype} must be int32, of 32 tokens each")

    @classmethod
    def neutral(cls) -> GrammarMask:
        """Leaves rows as they are."""
        return cls(np.zeros([1], np.int32), False)

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """As :meth:`Policy.stack`, all as wide as the widest; what words lack is forbidden."""
        # Bits, whatever the sign of the integers that hold them.
        stages = [cls(np.asarray(stage.words).astype(np.int32), stage.enabled) for stage in stages]
        width = _widest([stage.words for stage in stages])
        return super().stack([cls(widened(s.words, width, 0), s.enabled) for s in stages])

    def __call__(self, logits, context=None):
        """``-inf`` at the tokens not allowed."""
        return self.constrained(logits)

    def constrained(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """``-inf`` at the tokens not allowed."""

        def allow(logits, words, enabled):
            bits = (words[:, :, None] >> jnp.arange(32, dtype=words.dtype)) & 1
            bits = bits.reshape(len(words), -1)[:, : logits.shape[1]]
            allowed = jnp.pad(bits, ((0, 0), (0, logits.shape[1] - bits.shape[1]))) == 1
            return jnp.where(allowed | ~enabled[:, None], logits, -jnp.inf)

        batch = len(logits)
        return row_map(allow, logits, per_row(self.words, batch, 1), per_row(self.enabled, batch))


def _widest(arrays: Sequence[np.ndarray]) -> list[int]:
    """The largest of each dimension."""
    return [max(sizes) for sizes in zip(*(np.shape(a) for a in arrays), strict=True)]
