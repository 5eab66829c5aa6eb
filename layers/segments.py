"""Packed rows: what an integer `segment_ids` array means, once for every layer.

A row of `segment_ids` labels each token with the document it belongs to; 0 is padding, which may
stand left, right or between documents. A new segment starts wherever two successive non-padding
tokens carry different ids, so ids need not be sorted or unique within a row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..sharding import laid_like, whole


def _along_rows(count: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Counts along whole rows, where the sequence may be split over devices; the result is too."""

    @functools.wraps(count)
    def run(segment_ids):
        return laid_like(count(whole(segment_ids, 1)), segment_ids)

    return run


def is_token(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a token stands, False on padding."""
    return segment_ids != 0


def _previous_id(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Id of the last non-padding token strictly before each position; 0 where there is none."""
    last = jax.lax.associative_scan(
        lambda left, right: jnp.where(right != 0, right, left), segment_ids, axis=1
    )
    return jnp.pad(last[:, :-1], ((0, 0), (1, 0)))


@_along_rows
def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the first token of every segment except the row's first one.

    These are the places where a recurrent state restarts from zero: the first segment of a row
    continues from the state that the caller hands in.
    """
    previous = _previous_id(segment_ids)
    return is_token(segment_ids) & (previous != 0) & (previous != segment_ids)


@_along_rows
def segment_index(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Running number of each position's segment: 0, 1, 2, ... along the row (int32).

    Non-decreasing. Padding inherits the number of the token before it (0 before the first token),
    so two positions share a segment exactly when their numbers are equal and both are tokens.
    """
    return jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)


@_along_rows
def token_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its own segment stand before each token: 0, 1, 2, ... (int32).

    Padding counts nothing, wherever it stands, so a left-padded row has the positions of the row
    alone. On padding itself the value is that of the token before it (0 before the first one).
    """
    count = jnp.cumsum(is_token(segment_ids), axis=1, dtype=jnp.int32) - 1
    # At a segment's start, the count is what the segments before it amount to; it only grows.
    first = jnp.where(segment_starts(segment_ids), count, 0)
    return jnp.maximum(count - jax.lax.cummax(first, axis=1), 0)
