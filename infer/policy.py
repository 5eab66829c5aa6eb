"""Decoding policies: from next-token logits to the distribution that the next token is drawn from.

A policy is a small frozen dataclass, hashable and therefore static under ``jit``. It maps float32
logits ``[B, V]`` to float32 logits ``[B, V]`` of the proposal distribution; the loop draws from it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..errors import InputError


class Policy(Protocol):
    """From the model's logits to the proposal's."""

    deterministic: ClassVar[bool] = False
    """Whether the proposal always has all its probability on one token."""

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The proposal's logits; ``-inf`` forbids a token."""


@dataclasses.dataclass(frozen=True)
class Greedy:
    """All probability on the most likely token (the first of equals)."""

    deterministic: ClassVar[bool] = True

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """0 at the argmax, ``-inf`` elsewhere."""
        chosen = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == chosen, 0.0, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Probabilities proportional to ``p ** (1 / value)``: below 1 sharper, above 1 flatter."""

    value: float = 1.0
    deterministic: ClassVar[bool] = False

    def __post_init__(self):
        if not (self.value > 0 and math.isfinite(self.value)):
            raise InputError(
                f"temperature={self.value} must be positive; for the limit 0 use Greedy()"
            )

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits divided by the temperature."""
        return logits / self.value


@dataclasses.dataclass(frozen=True, init=False)
class Chain:
    """Policies applied one after another, first to last."""

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy):
        object.__setattr__(self, "policies", tuple(policies))

    @property
    def deterministic(self) -> bool:
        """Whether one of the policies leaves a single token."""
        return any(policy.deterministic for policy in self.policies)

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The last policy's logits."""
        for policy in self.policies:
            logits = policy(logits)
        return logits
