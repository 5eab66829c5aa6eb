"""CALM's first stage: a variational autoencoder of chunks; and how well it gives tokens back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..configs.objectives import Reconstruction
from ..layers.chunks import from_chunks, to_chunks
from ..sharding import constrain
from .cross_entropy import cross_entropy
from .sums import Batch, Sums, row_draw, row_uniform

# Tags of what is drawn; token dropout has none.
_NOISE, _LATENT_DROPOUT = 1, 2


def reconstruction(
    config: Reconstruction,
    model: nnx.Module,
    batch: Batch,
    key: jax.Array,
    training: bool = True,
) -> Sums:
    """``K CE + kl_weight KL`` of every chunk (nats).

    Args:
        config: its settings.
        model: an autoencoder: ``encode``, ``decode`` and ``logits``.
        batch: ``tokens [B, T]``, whole chunks; optionally ``segment_ids``: chunks count whose first
            token is one, with all their tokens, padding too.
        key: of what is drawn: noise always, and what is dropped in training.
        training: otherwise nothing is dropped.

    Returns:
        Sums over chunks; the metrics are ``nll``, a token's cross-entropy, ``accuracy``, the share
        of tokens that are given back, ``kl``, nats of a chunk without clipping, ``std``, the
        posterior's mean standard deviation, and ``active``, the share of the latent's dimensions
        whose divergence is above the floor.
    """
    tokens, size = batch["tokens"], model.config.chunk_size
    read = tokens
    if training and config.token_dropout:
        keep = row_uniform(batch, key) >= config.token_dropout
        read = jnp.where(keep, tokens, config.dropped_token_id)
    mean, log_std = model.encode(read)
    shape = mean.shape[1:]
    noise = row_draw(batch, key, lambda key: jax.random.normal(key, shape, jnp.float32), _NOISE)
    latents = mean + jnp.exp(log_std) * noise
    if training and config.latent_dropout:
        rate = config.latent_dropout
        keep = row_draw(
            batch,
            key,
            lambda key: jax.random.bernoulli(key, jnp.float32(1 - rate), shape),
            _LATENT_DROPOUT,
        )
        latents = jnp.where(keep, latents / (1 - rate), 0)
    weights = chunk_weights(batch, size)
    each = jnp.broadcast_to(weights[..., None], (*weights.shape, size)) / size
    nll, sums = cross_entropy(
        model,
        model.decode(latents),
        tokens,
        from_chunks(each),
        max_logits=config.max_logits,
    )
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(2 * log_std) - 1 - 2 * log_std)
    # As published, the floor itself passes a gradient.
    clipped = jnp.where(divergence >= config.kl_floor, divergence, config.kl_floor)

    def total(x):
        return jnp.sum(weights * x)

    loss = size * nll + config.kl_weight * total(jnp.sum(clipped, axis=-1))
    metrics = {
        "nll": sums["nll"],
        "accuracy": sums["accuracy"],
        "kl": total(jnp.sum(divergence, axis=-1)),
        "std": total(jnp.mean(jnp.exp(log_std), axis=-1)),
        "active": total(jnp.mean(divergence > config.kl_floor, axis=-1)),
    }
    return loss, jnp.sum(weights), metrics


def chunk_weights(batch: Batch, size: int) -> Float[Array, "B L"]:
    """1 for every chunk whose first token is one, 0 for the others."""
    if "segment_ids" not in batch:
        ones = jnp.ones((batch["tokens"].shape[0], batch["tokens"].shape[1] // size), jnp.float32)
        return constrain(ones, "batch", "seq")
    return (to_chunks(batch["segment_ids"], size)[:, :, 0] > 0).astype(jnp.float32)


def reconstruction_accuracy(
    autoencoder: nnx.Module, batch: Batch, key: jax.Array
) -> Float[Array, ""]:
    """The share of the batch's tokens that come back through a draw of their latents."""
    _, weight, metrics = reconstruction(Reconstruction(), autoencoder, batch, key, training=False)
    return metrics["accuracy"] / jnp.maximum(weight, 1)
