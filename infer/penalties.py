"""Stages that discourage or forbid repetition, by what the row holds already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from .policy import Policy, check, column, needed, policy
from .rows import NO_TOKEN, per_row, power_of_two, row_map


@policy()
class RepetitionPenalty(Policy):
    """Every token that the prompt or the output holds is made less likely, once.

    Positive logits are divided by ``value``, others multiplied. Source: CTRL (arXiv 1909.05858).

    Attributes:
        value: positive; above 1 discourages, below 1 encourages, 1 does nothing.
    """

    value: Any
    needs: ClassVar[frozenset[str]] = frozenset({"counts"})
    rank: ClassVar[int] = 30

    def __post_init__(self):
        remedy = "must be a positive number; 1 changes nothing"
        check(
            lambda x: np.isfinite(x) & (np.asarray(x) > 0), "repetition_penalty", self.value, remedy
        )

    @classmethod
    def neutral(cls) -> RepetitionPenalty:
        """1, which changes nothing."""
        return cls(1.0)

    def __call__(self, logits, context=None):
        """``l / value`` or ``l * value`` of the tokens seen."""
        counts = needed(context, self).counts
        value = column(self.value).astype(logits.dtype)
        penalised = jnp.where(logits > 0, logits / value, logits * value)
        return jnp.where((counts.prompt > 0) | (counts.output > 0), penalised, logits)


@policy()
class PresenceFrequencyPenalty(Policy):
    """Less ``presence`` for a token that occurred, and less ``frequency`` for every time it did.

    Attributes:
        presence: any finite number; 0 does nothing.
        frequency: likewise.
        include_prompt: count the prompt's tokens too, not the output's alone.
    """

    presence: Any = 0.0
    frequency: Any = 0.0
    include_prompt: Any = False
    needs: ClassVar[frozenset[str]] = frozenset({"counts"})
    rank: ClassVar[int] = 40

    def __post_init__(self):
        remedy = "must be a finite number; 0 changes nothing"
        check(np.isfinite, "presence_penalty", self.presence, remedy)
        check(np.isfinite, "frequency_penalty", self.frequency, remedy)

    @classmethod
    def neutral(cls) -> PresenceFrequencyPenalty:
        """Both 0, which changes nothing."""
        return cls()

    def __call__(self, logits, context=None):
        """``l - presence [c > 0] - frequency c``."""
        counts = needed(context, self).counts
        count = counts.output + jnp.where(column(self.include_prompt), counts.prompt, 0)
        presence, frequency = (
            column(x).astype(logits.dtype) for x in (self.presence, self.frequency)
        )
        penalty = presence * (count > 0) + frequency * count
        return logits - penalty


@policy(static=("longest",))
class NoRepeatNgram(Policy):
    """Forbids tokens that would complete an n-gram which the row, prompt included, has already.

    A row shorter than ``size`` is left alone; at size 1 every token of the row is forbidden.

    Attributes:
        size: n, at least 1.
        longest: that no row's size exceeds. If None it is found where ``size`` is known when the
            stage is made, and rounded up to a power of two.
    """

    size: Any
    longest: int | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"context"})
    can_starve: ClassVar[bool] = True
    rank: ClassVar[int] = 50

    def __post_init__(self):
        check(
            lambda n: (np.mod(n, 1) == 0) & (np.asarray(n) >= 1),
            "no_repeat_ngram",
            self.size,
            "must be a whole number of tokens, at least 1",
        )
        if self.longest is not None:
            remedy = f"exceeds longest={self.longest}"
            fits = lambda n: (np.asarray(n) <= self.longest) | (np.asarray(n) == NO_TOKEN)  # noqa: E731
            check(fits, "no_repeat_ngram", self.size, remedy)
        elif isinstance(self.size, jax.core.Tracer):
            raise InputError("no_repeat_ngram is traced; say longest=, the largest that may come")
        else:
            sizes = np.asarray(self.size)
            longest = int(np.max(sizes, initial=1, where=sizes < NO_TOKEN))
            object.__setattr__(self, "longest", max(4, power_of_two(longest)))

    @classmethod
    def neutral(cls) -> NoRepeatNgram:
        """A size that no row reaches."""
        return cls(NO_TOKEN)

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """As :meth:`Policy.stack`; the rows' ``longest`` is the largest."""
        longest = max(stage.longest for stage in stages)
        return super().stack([cls(stage.size, longest) for stage in stages])

    def __call__(self, logits, context=None):
        """``-inf`` at the tokens that followed the row's last ``size - 1`` tokens before."""
        context = needed(context, self)

        def forbid(logits, tokens, length, size):
            place = jnp.arange(tokens.shape[1])
            followed = (place < length[:, None]) & (place >= size[:, None] - 1)
            for back in range(1, self.longest):
                # What stands ``back`` places before each place, and before the next token.
                before = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
                at = jnp.maximum(length - back, 0)[:, None]
                last = jnp.take_along_axis(tokens, at, axis=1)
                followed &= (before == last) | (back >= size[:, None])
            rows = jnp.arange(len(logits))[:, None]
            forbidden = jnp.where(followed, tokens, NO_TOKEN)
            return logits.at[rows, forbidden].set(-jnp.inf, mode="drop")

        return row_map(
            forbid, logits, context.tokens, context.length, per_row(self.size, len(logits))
        )
