"""Objectives: from a model and a batch to sums (see :mod:`.sums`), which the step divides once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..configs.experiment import AutoDeco, NextToken, Objective
from .autodeco import autodeco
from .layout import split_rows
from .sums import Batch, Sums, num_chunks, shift

ObjectiveFn = Callable[[nnx.Module, Batch, jax.Array], Sums]


def make_objective(config: Objective) -> ObjectiveFn:
    """The function that these settings describe."""
    match config:
        case NextToken():
            return functools.partial(next_token, config)
        case AutoDeco():
            return functools.partial(autodeco, config)
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
    chunks = num_chunks(*targets.shape, vocab_size, max_logits, ("batch", "seq", "vocab"))
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
