"""Objectives: from a model and a batch to sums, which the step divides once.

``objective(model, batch, key) -> (loss_sum, weight_sum, metric_sums)``: float32 scalars summed over
the batch's tokens with their weights. Sums add up over microbatches, devices and batches of an
evaluation alike. ``metric_sums["stats"]`` holds what the model counted (a router's loads), at the
paths of the parameters that it is about.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..configs.experiment import NextToken, Objective
from ..sharding import constrain
from .layout import split_rows, ways

Batch = Mapping[str, Array]
Sums = tuple[Float[Array, ""], Float[Array, ""], dict[str, Any]]
ObjectiveFn = Callable[[nnx.Module, Batch, jax.Array], Sums]


def make_objective(config: Objective) -> ObjectiveFn:
    """The function that these settings describe."""
    match config:
        case NextToken():
            return functools.partial(next_token, config)
    raise TypeError(f"no objective for {config!r}")


def next_token(config: NextToken, model: nnx.Module, batch: Batch, key: jax.Array) -> Sums:
    """Cross-entropy of every next token within its document (nats), plus the z-loss.

    Args:
        config: its settings.
        model: has ``hidden_states`` and ``logits``.
        batch: ``tokens [B, T]`` int32; optionally ``segment_ids`` (0 is padding; without it each
            row is one document), ``positions`` and ``loss_weights [B, T]``, the weight of each
            *token* as a target (1 if absent; 0 leaves a prompt out).
        key: unused, nothing here is random.

    Returns:
        Sums; the metrics are ``nll`` (without the z-loss), ``z_loss`` and ``accuracy`` (greedy).
    """
    del key
    targets, weights = shift(batch)
    hidden, _, stats = model.hidden_states(
        batch["tokens"], segment_ids=batch.get("segment_ids"), positions=batch.get("positions")
    )
    sums = cross_entropy(
        model.logits,
        hidden,
        targets,
        weights,
        z_loss=config.z_loss,
        max_logits=config.max_logits,
    )
    loss = sums["nll"] + sums["z_loss"]
    return loss, jnp.sum(weights), sums | {"stats": stats}


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


def cross_entropy(
    logits_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    max_logits: int = 2**27,
) -> dict[str, Float[Array, ""]]:
    """Weighted sums ``nll``, ``z_loss`` and ``accuracy`` over all positions, float32.

    At most about ``max_logits`` logits of a device exist at once, in the backward pass too: longer
    sequences are taken in equal chunks, whose logits are computed again for the gradient. Chunks
    divide the sequence length; one with few divisors makes them smaller than need be.
    """
    vocab_size = jax.eval_shape(logits_of, hidden).shape[-1]
    chunks = _num_chunks(*targets.shape, vocab_size, max_logits)
    sums = functools.partial(_token_sums, logits_of, z_loss)
    if chunks == 1:
        return sums(hidden, targets, weights)
    parts = [split_rows(x, chunks, axis=1) for x in (hidden, targets, weights)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total, part):
        return jax.tree.map(jnp.add, total, sums(*part)), None

    zero = dict.fromkeys(("nll", "z_loss", "accuracy"), jnp.float32(0))
    return jax.lax.scan(body, zero, parts)[0]


def _token_sums(logits_of, z_loss, hidden, targets, weights) -> dict[str, Float[Array, ""]]:
    logits = logits_of(hidden).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum instead of a gather: it stays local where the vocabulary is sharded.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    nll = log_z - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    right = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == targets
    return {
        "nll": jnp.sum(weights * nll),
        "z_loss": z_loss * jnp.sum(weights * log_z**2),
        "accuracy": jnp.sum(weights * right),
    }


def _num_chunks(rows: int, length: int, vocab_size: int, max_logits: int) -> int:
    """The least divisor of the (local) sequence length that makes chunks small enough."""
    logits = rows * length * vocab_size / ways("batch", "seq", "vocab")
    local = max(length // ways("seq"), 1)
    sizes = (n for n in range(1, local) if local % n == 0)
    return next((n for n in sizes if logits / n <= max_logits), local)
