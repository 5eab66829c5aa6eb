"""CALM's second stage: a head that draws the next chunk's latent, of a frozen autoencoder.

The energy score of N draws ``x`` of the model and M draws ``y`` of the chunk's posterior,

    S = mean over pairs |x_i - x_j|^alpha  -  2 mean |x_i - y_j|^alpha,

is strictly proper for ``0 < alpha < 2``: its expectation is largest where the model's law is the
target's. The loss ``-S`` is then ``E|y - y'|^alpha``, not 0. Source: arXiv 2510.27688, section 4.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..configs.objectives import NextVector
from ..layers.chunks import chunk_segments, to_chunks
from ..sharding import constrain, repeat
from .reconstruction import chunk_weights
from .sums import Batch, Sums, row_draw

# Draws of the posterior that exist at once: the others are drawn when they are needed, twice.
_TARGETS_AT_ONCE = 10
# Tags of what is drawn; targets have one each from the last of them on.
_HEAD, _LOSS, _TARGETS = 1, 2, 3


def next_vector(config: NextVector, model: nnx.Module, batch: Batch, key: jax.Array) -> Sums:
    """The head's loss for every chunk but a document's first.

    Args:
        config: its settings.
        model: a :class:`~jaxalope.model.calm.CALM`.
        batch: ``tokens [B, T]``, whole chunks; optionally ``segment_ids``: a chunk belongs where
            its first token does.
        key: of what is drawn.

    Returns:
        Sums over chunks; the metrics of an energy head are ``distance``, between its draws and the
        posterior's, ``spread``, between its own, and ``floor``, between the posterior's: the loss
        of a model that knew the next chunk.
    """
    size = model.config.chunk_size
    hidden, _, stats = model.hidden_states(batch["tokens"], segment_ids=batch.get("segment_ids"))
    posterior = jax.lax.stop_gradient(model.autoencoder.encode(batch["tokens"]))
    mean, log_std = (_following(x) for x in posterior)
    std, weights = jnp.exp(log_std), _weights(batch, size)
    if model.config.head == "energy":
        losses, metrics = _energy(config, model, batch, key, hidden, mean, std)
    else:
        losses, metrics = _regression(config, model, batch, key, hidden, mean, std), {}
    metrics = {name: jnp.sum(weights * x) for name, x in metrics.items()}
    return jnp.sum(weights * losses), jnp.sum(weights), metrics | {"stats": stats}


def _energy(config, model, batch, key, hidden, mean, std):
    """``-S`` of every chunk ``[B, L]``, and its parts."""
    count, head = config.num_samples, model.latent_head
    draws = mean.shape[1] * count
    noise = row_draw(batch, key, lambda key: head.noise(key, (draws,)), _HEAD)
    samples = to_chunks(model.draw(hidden, noise), count, None)
    spread = _mean_pair_distance(samples, config.alpha)

    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
    def compare(samples, mean, std, number, size):
        shape = (mean.shape[1], size, mean.shape[2])
        drawn = row_draw(
            batch,
            key,
            lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32),
            _TARGETS,
        )
        targets = mean[:, :, None] + std[:, :, None] * drawn
        distance = power_distance(samples[:, :, :, None] - targets[:, :, None], config.alpha)
        # Neighbours in the order that they are drawn in, the first and the last too.
        beside = jnp.roll(targets, 1, axis=2)
        floor = power_distance(targets - beside, config.alpha)
        return distance.sum(axis=(2, 3)), floor.sum(axis=2)

    size = min(_TARGETS_AT_ONCE, config.num_targets)
    whole, left = divmod(config.num_targets, size)

    def body(total, number):
        return jax.tree.map(jnp.add, total, compare(samples, mean, std, number, size)), None

    zero = jnp.zeros_like(mean[..., 0])
    total = jax.lax.scan(body, (zero, zero), jnp.arange(whole))[0]
    if left:
        total = jax.tree.map(jnp.add, total, compare(samples, mean, std, whole, left))
    distance = total[0] / (count * config.num_targets)
    metrics = {"distance": distance, "spread": spread, "floor": total[1] / config.num_targets}
    return 2 * distance - spread, metrics


def _regression(config, model, batch, key, hidden, mean, std):
    """The own loss of a diffusion or flow head, over N draws of every chunk's posterior."""
    count, head = config.num_samples, model.latent_head
    draws, latent = mean.shape[1] * count, mean.shape[2]
    drawn = row_draw(
        batch, key, lambda key: jax.random.normal(key, (draws, latent), jnp.float32), _TARGETS
    )
    targets = repeat(mean, count, axis=1) + repeat(std, count, axis=1) * drawn
    time, noise = row_draw(batch, key, lambda key: head.loss_noise(key, (draws,)), _LOSS)
    return jnp.mean(to_chunks(head.loss(hidden, targets, time, noise), count), axis=-1)


def power_distance(difference: Float[Array, "... Z"], alpha: float) -> Float[Array, "..."]:
    """``|difference|^alpha``, whose gradient is 0 at 0: a fresh head's draws all coincide."""
    square = jnp.sum(jnp.square(difference), axis=-1)
    apart = square > 0
    return jnp.where(apart, jnp.where(apart, square, 1) ** (alpha / 2), 0)


def _mean_pair_distance(samples: Float[Array, "B L N Z"], alpha: float) -> Float[Array, "B L"]:
    """Mean over ordered pairs of different draws."""
    count = samples.shape[2]
    # Each pair once, at every distance along a ring: half of a matrix with a diagonal of zeros.
    total = jnp.zeros_like(samples[:, :, 0, 0])
    for step in range(1, count // 2 + 1):
        apart = power_distance(samples - jnp.roll(samples, step, axis=2), alpha)
        # Where the ring is halved, every pair comes twice.
        total += apart.sum(axis=2) * (0.5 if 2 * step == count else 1.0)
    return total / (count * (count - 1) / 2)


def _weights(batch: Batch, size: int) -> Float[Array, "B L"]:
    """1 where the next chunk is of the same document."""
    valid = chunk_weights(batch, size)
    inside = jnp.arange(valid.shape[1]) < valid.shape[1] - 1
    weights = valid * inside * _following(valid)
    if "segment_ids" in batch:
        ids = chunk_segments(batch["segment_ids"], size)
        weights *= ids == _following(ids)
    return weights


def _following(x: Array) -> Array:
    """What belongs to the next chunk; what a row ends with wraps to its start."""
    wide = ("batch", None, *(None,) * (x.ndim - 2))
    x = jnp.roll(constrain(x, *wide), -1, axis=1)
    return constrain(x, "batch", "seq", *(None,) * (x.ndim - 2))
