"""THE loop: one ``lax.while_loop`` over a state that any decoding step may move.

The loop knows which rows are done, and nothing of how tokens are chosen. A step maps state to state
and may commit any number of positions. :class:`DecodeState` is the state of every step that writes
a canvas of tokens; a program that needs more (weights of particles, beams) wraps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from ..sharding import take_rows
from .cache import CacheLayout
from .policy import Counts

RUNNING, STOPPED, LENGTH = 0, 1, 2
FINISH_REASONS = ("running", "stop", "length")


class _State(Protocol):
    @property
    def done(self) -> Bool[Array, "B"]:
        """Rows that have ended."""


State = TypeVar("State", bound=_State)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that decoding carries from step to step; compiled decoders donate it.

    Between steps the cache has read all committed tokens but the last: a step first reads that one.
    So a row that goes back to a shorter length goes on from there as from any other.

    Attributes:
        tokens: the canvas: prompt, then what was committed, then zeros.
        length: positions committed in each row, the prompt's (at least one) included.
        prompt_length: of each row.
        limit: length at which a row ends.
        reason: why a row ended: ``RUNNING``, ``STOPPED`` (it drew a stop token) or ``LENGTH``.
        starved: whether a row's policy ever forbade every token.
        key: one a row, from its request's seed alone.
        cache: the model's.
        records: what was written down of each position: ``{name: [B, T, ...]}``, zeros where
            nothing was committed.
        counts: of tokens, where the policy needs them.
    """

    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]
    prompt_length: Int[Array, "B"]
    limit: Int[Array, "B"]
    reason: Int[Array, "B"]
    starved: Bool[Array, "B"]
    key: PRNGKeyArray
    cache: Any
    records: dict[str, Array]
    counts: Counts | None = None

    @property
    def done(self) -> Bool[Array, "B"]:
        """Rows that have ended."""
        return self.reason != RUNNING

    def take(self, layout: CacheLayout, rows: Int[Array, "R"]) -> DecodeState:
        """The state of these rows; one that occurs several times is forked."""
        state = jax.tree.map(lambda x: take_rows(x, rows), dataclasses.replace(self, cache=()))
        return dataclasses.replace(state, cache=layout.take(self.cache, rows))

    def where(self, layout: CacheLayout, mask: Bool[Array, "B"], other: DecodeState) -> DecodeState:
        """This state's rows where ``mask``, ``other``'s elsewhere."""

        def choose(a, b):
            return jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

        mine, theirs = (dataclasses.replace(s, cache=()) for s in (self, other))
        cache = layout.where(mask, self.cache, other.cache)
        return dataclasses.replace(jax.tree.map(choose, mine, theirs), cache=cache)

    def with_limit(self, limit: Int[Array, "B"]) -> DecodeState:
        """The same text with another limit: rows that ended for length go on if they may."""
        open_rows = self.reason != STOPPED
        reason = jnp.where(self.length >= limit, LENGTH, RUNNING)
        return dataclasses.replace(
            self, limit=limit, reason=jnp.where(open_rows, reason, STOPPED).astype(jnp.int32)
        )


def run(
    step: Callable[[State], State], state: State, max_steps: int | Int[Array, ""] | None = None
) -> State:
    """Apply ``step`` until every row is done, or ``max_steps`` times so that a host can stream."""

    def running(carry):
        count, state = carry
        more = ~jnp.all(state.done)
        return more if max_steps is None else (count < max_steps) & more

    def body(carry):
        count, state = carry
        return count + 1, step(state)

    return jax.lax.while_loop(running, body, (jnp.int32(0), state))[1]
