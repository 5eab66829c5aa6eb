"""What objectives share: the sums that they return, their targets, draws and chunks.

``objective(model, batch, key) -> (loss_sum, weight_sum, metric_sums)``: float32 scalars summed over
the batch's tokens with their weights. Sums add up over microbatches, devices and batches of an
evaluation alike. ``metric_sums["stats"]`` holds what the model counted (a router's loads), at the
paths of the parameters that it is about.

A loss that is the sum of several means has a denominator for each: ``metric_sums["terms"]`` holds
the others, ``{name: (loss_sum, weight_sum)}``. The step divides every term by its own weight, and
the gradient likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..sharding import constrain
from .layout import ways

Batch = Mapping[str, Array]
Sums = tuple[Float[Array, ""], Float[Array, ""], dict[str, Any]]


def shift(batch: Batch) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """``(targets, weights)``: the next token at every position, and what predicting it counts.

    A document's last position, padding and the end of the row count nothing.
    """

    def following(x):
        # A shift along a dimension that may be sharded; these arrays are small.
        x = jnp.roll(constrain(x, "batch", None), -1, axis=1)
        return constrain(x, "batch", "seq")

    tokens = batch["tokens"]
    segment_ids = batch.get("segment_ids")
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    inside = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    inside = inside & (segment_ids > 0) & (following(segment_ids) == segment_ids)
    weights = inside.astype(jnp.float32)
    if "loss_weights" in batch:
        weights *= following(batch["loss_weights"].astype(jnp.float32))
    return following(tokens), weights


def with_row_keys(batch: Batch, key: jax.Array) -> Batch:
    """``batch`` with ``row_keys [B, 2]``, the raw data of a key for every row of the global batch.

    What is drawn from them does not depend on how rows are accumulated or laid out.
    """
    rows = constrain(jnp.arange(batch["tokens"].shape[0]), "batch")
    keys = jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(rows)
    return {**batch, "row_keys": keys}


def row_uniform(batch: Batch, key: jax.Array) -> Float[Array, "B T"]:
    """A number in [0, 1) for every token, by the batch's row keys (made of ``key`` if absent)."""
    length = batch["tokens"].shape[1]
    return row_draw(batch, key, lambda key: jax.random.uniform(key, (length,), jnp.float32))


def row_draw(batch: Batch, key: jax.Array, draw: Callable[[jax.Array], Any], tag: int = 0) -> Any:
    """``draw(key)`` of every row, ``[T, ...]`` arrays stacked to ``[B, T, ...]``.

    Args:
        batch: whose row keys are used, made of ``key`` if absent.
        key: see there.
        draw: of one row.
        tag: of draws that differ from those with another.
    """
    keys = (batch if "row_keys" in batch else with_row_keys(batch, key))["row_keys"]

    def one(data):
        key = jax.random.wrap_key_data(data)
        return draw(jax.random.fold_in(key, tag) if tag else key)

    drawn = jax.vmap(one)(constrain(keys, "batch", None))
    return jax.tree.map(lambda x: constrain(x, "batch", "seq", *(None,) * (x.ndim - 2)), drawn)


def num_chunks(
    rows: int, length: int, vocab_size: int, max_logits: int, axes: tuple[str, ...]
) -> int:
    """The least divisor of the (local) sequence length that makes chunks small enough.

    ``axes`` are those over which the devices share the logits out.
    """
    logits = rows * length * vocab_size / ways(*axes)
    local = max(length // ways("seq"), 1)
    sizes = (n for n in range(1, local) if local % n == 0)
    return next((n for n in sizes if logits / n <= max_logits), local)
