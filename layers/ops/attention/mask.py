"""Which keys a query sees: the one definition that every implementation without kernels shares."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Marks(NamedTuple):
    """What the mask reads of tokens, queries or keys: their positions, segments and views."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None = None
    noisy: Bool[Array, "B T"] | None = None


def visible(
    queries: Marks, keys: Marks, *, window: int | None, block: int | None
) -> Bool[Array, "B T S"]:
    """True where the key is of the query's segment, in no later block, and inside its window.

    ``window`` counts the query itself: the keys at distances ``0 .. window - 1`` are seen. Where
    tokens are noisy or not, a noisy one is seen by the noisy ones of its own block alone, and sees
    clean ones of earlier blocks alone.
    """
    i, j = (_blocks(queries.positions, block)[:, :, None], _blocks(keys.positions, block)[:, None])
    mask = j <= i
    if queries.noisy is not None:
        noisy_query, noisy_key = queries.noisy[:, :, None], keys.noisy[:, None]
        mask = jnp.where(noisy_key, noisy_query & (i == j), mask & ~(noisy_query & (i == j)))
    if window is not None:
        mask &= queries.positions[:, :, None] - keys.positions[:, None] < window
    if queries.segments is not None:
        mask &= keys.segments[:, None] == queries.segments[:, :, None]
    return mask


def _blocks(positions, block):
    if block is None:
        return jnp.zeros_like(positions)
    return positions if block == 1 else positions // block
