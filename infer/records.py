"""What the loop writes down of every committed token, beside the token itself.

A record is a small frozen dataclass, static under ``jit``: the loop keeps an array ``[B, T, ...]``
for each and fills it at the position that a token is committed to. Positions without a committed
token hold zeros, so that sums over a row are sums over its tokens.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Record(Protocol):
    """One thing to write down.

    Attributes:
        name: its key in ``DecodeState.records``.
    """

    name: ClassVar[str]

    def value(
        self,
        logits: Float[Array, "B V"],
        proposal: Float[Array, "B V"],
        token: Int[Array, "B"],
    ) -> Array:
        """``[B, ...]`` of a token drawn from ``proposal`` where the model said ``logits``."""


def log_prob_of(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    """Log-probability of each row's token under the normalised ``logits``, float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@dataclasses.dataclass(frozen=True)
class LogProb:
    """Of the token under the model itself: temperature 1, the whole vocabulary."""

    name: ClassVar[str] = "logprob"

    def value(self, logits, proposal, token):
        """``[B]`` float32, in nats."""
        return log_prob_of(logits, token)


@dataclasses.dataclass(frozen=True)
class ProposalLogProb:
    """Of the token under the distribution that it was drawn from."""

    name: ClassVar[str] = "proposal_logprob"

    def value(self, logits, proposal, token):
        """``[B]`` float32, in nats."""
        return log_prob_of(proposal, token)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """Of the model's next-token distribution that the token was drawn at."""

    name: ClassVar[str] = "entropy"

    def value(self, logits, proposal, token):
        """``[B]`` float32, in nats."""
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, -1e30), axis=-1)


@dataclasses.dataclass(frozen=True)
class Top:
    """The likeliest tokens at each position, with their log-probabilities.

    Attributes:
        count: how many.
        processed: under the proposal instead of the model itself.
        part: ``"ids"`` or ``"logprobs"``.
    """

    count: int
    processed: bool = False
    part: str = "ids"

    @property
    def name(self) -> str:
        """``"top_ids"`` or ``"top_logprobs"``."""
        return f"top_{self.part}"

    def value(self, logits, proposal, token):
        """``[B, count]``: int32 ids, or float32 nats (``-inf`` for forbidden tokens)."""
        log_p = jax.nn.log_softmax((proposal if self.processed else logits).astype(jnp.float32))
        values, ids = jax.lax.top_k(log_p, self.count)
        return ids.astype(jnp.int32) if self.part == "ids" else values
