"""Rows of tokens as rows of chunks, and back: chunk ``t`` is the tokens ``t K`` to ``t K + K - 1``.

A chunk lies on one device: the sharded dimension of the sequence is split, and merged, without
moving anything.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from ..errors import InputError
from ..sharding import kernel_map


def to_chunks(x: Shaped[Array, "B T ..."], size: int, *axes: str | None) -> Array:
    """``[B, T, ...]`` to ``[B, T / size, size, ...]``; ``axes`` are those of what follows ``T``.

    Raises:
        InputError: ``T`` is no multiple of the chunk's size.
    """
    if x.shape[1] % size:
        raise InputError(
            f"{x.shape[1]} tokens a row are no whole chunks of {size}; pad or cut rows to a "
            "multiple of it"
        )
    wide = ("batch", "seq", *axes)

    def split(x):
        return x.reshape(x.shape[0], -1, size, *x.shape[2:])

    return kernel_map(split, (wide,), ("batch", "seq", None, *axes))(x)


def from_chunks(x: Shaped[Array, "B L K ..."], *axes: str | None) -> Array:
    """``[B, L, K, ...]`` to ``[B, L K, ...]``; ``axes`` are those of what follows ``K``."""
    wide = ("batch", "seq", *axes)

    def merge(x):
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return kernel_map(merge, (("batch", "seq", None, *axes),), wide)(x)


def chunk_segments(segment_ids: Array, size: int) -> Array:
    """``[B, T]`` segment ids of tokens to ``[B, T / size]`` ids of chunks: their first token's."""
    return jnp.asarray(to_chunks(segment_ids, size)[:, :, 0])
