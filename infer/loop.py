"""THE loop: one ``lax.while_loop`` over a state that any decoding step may move.

The loop knows a canvas of tokens, which rows are done, and nothing of how tokens are chosen. A step
maps state to state and may commit any number of positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

RUNNING, STOPPED, LENGTH = 0, 1, 2
FINISH_REASONS = ("running", "stop", "length")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that decoding carries from step to step; the loop donates it.

    Attributes:
        tokens: the canvas: prompt, then what was committed, then padding.
        logprobs: of every committed token under the model itself (temperature 1), 0 elsewhere.
        length: positions committed in each row, the prompt's included.
        limit: length at which a row ends.
        reason: why a row ended: ``RUNNING``, ``STOPPED`` (it drew a stop token) or ``LENGTH``.
        logits: the model's, for the position after the last committed one.
        cache: the model's.
        key: one a row, from its request's seed alone.
    """

    tokens: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    length: Int[Array, "B"]
    limit: Int[Array, "B"]
    reason: Int[Array, "B"]
    logits: Float[Array, "B V"]
    cache: Any
    key: PRNGKeyArray

    @property
    def done(self) -> Bool[Array, "B"]:
        """Rows that have ended."""
        return self.reason != RUNNING


Step = Callable[[DecodeState], DecodeState]


def run(step: Step, state: DecodeState, max_steps: int | Int[Array, ""]) -> DecodeState:
    """Apply ``step`` until every row is done, or ``max_steps`` times so that a host can stream."""

    def running(carry):
        count, state = carry
        return (count < max_steps) & ~jnp.all(state.done)

    def body(carry):
        count, state = carry
        return count + 1, step(state)

    return jax.lax.while_loop(running, body, (jnp.int32(0), state))[1]
