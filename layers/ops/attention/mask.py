"""Which keys a query sees: the one definition that every implementation without kernels shares."""

from __future__ import annotations

from jaxtyping import Array, Bool, Int


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    window: int | None,
) -> Bool[Array, "B T S"]:
    """True where the key is of the query's segment, not after it, and inside its window.

    ``window`` counts the query itself: the keys at distances ``0 .. window - 1`` are seen.
    """
    i, j = query_positions[:, :, None], key_positions[:, None, :]
    mask = j <= i
    if window is not None:
        mask &= i - j < window
    if query_segments is not None:
        mask &= key_segments[:, None, :] == query_segments[:, :, None]
    return mask
