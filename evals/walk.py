"""Texts continued from many of their places, through any model's cache.

A document is read once, from start to start. At each the cache is put aside, the text goes on from
it as the model draws it, and what that left in the cache is forgotten. Nothing is ever gone back
to, so a recurrent state serves as well as keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from ..sharding import constrain, kernel_map

ROWS = ("batch", None)


def walk(
    model: nnx.Module,
    tokens: Int[Array, "B T"],
    starts: Int[Array, "B P"],
    visit: Callable[[Any, Int[Array, "B"]], Any],
    *,
    gap: int,
    size: int = 1,
) -> Any:
    """What ``visit`` makes of every start.

    Args:
        model: the merged module; ``model(tokens, cache, segment_ids=)``.
        tokens: a document a row, padding after it; ``T`` is whole units.
        starts: units, ascending from 1 on.
        visit: ``(cache, start [B]) -> [B, ...]``: the cache has read the units before
            ``start - 1``, so that the unit before the start is still to be read.
        gap: units that a start may be away from the one before it, or the first from 1.
        size: tokens of a unit; the cache counts units.

    Returns:
        ``[B, P, ...]``.
    """
    tokens, starts = constrain(tokens, *ROWS), constrain(starts, *ROWS)
    cache = model.init_cache(tokens.shape[0], tokens.shape[1] // size)

    def step(carry, start):
        cache, read = carry
        places = read[:, None] + jnp.arange(gap)
        unread = (places < start[:, None] - 1).astype(jnp.int32)
        unread = jnp.repeat(unread, size, axis=1) if size > 1 else unread
        piece = units_at(tokens, places, size) * unread
        cache = model(piece, cache, segment_ids=unread)[1]
        return (cache, jnp.maximum(read, start - 1)), visit(cache, start)

    begin = constrain(jnp.zeros_like(starts[:, 0]), "batch")
    seen = jax.lax.scan(step, (cache, begin), jnp.moveaxis(starts, 1, 0))[1]
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), seen)


def units_at(
    tokens: Int[Array, "B T"], places: Int[Array, "B G"], size: int = 1
) -> Int[Array, "B M"]:
    """The tokens of these units, side by side; of places beyond the row, any."""

    def pick(tokens, places):
        units = tokens.reshape(tokens.shape[0], -1, size)
        places = jnp.clip(places, 0, units.shape[1] - 1)
        found = jnp.take_along_axis(units, places[:, :, None], axis=1)
        return found.reshape(places.shape[0], -1)

    return kernel_map(pick, (ROWS, ROWS), ROWS)(tokens, places)


def position_keys(
    seeds: Int[Array, "B"], offsets: Shaped[Array, "B ..."]
) -> Shaped[PRNGKeyArray, "B ..."]:
    """A key for each place of each document, from the document's seed alone.

    Args:
        seeds: of the documents.
        offsets: tokens before each place.
    """
    keys = jax.vmap(jax.random.key)(seeds)
    if offsets.ndim == 1:
        return jax.vmap(jax.random.fold_in)(keys, offsets)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, offsets)


def fold(keys: PRNGKeyArray, *numbers: Any) -> PRNGKeyArray:
    """Every key with these numbers folded in."""

    def one(key):
        return functools.reduce(jax.random.fold_in, numbers, key)

    for _ in range(keys.ndim):
        one = jax.vmap(one)
    return one(keys)
