"""What masked diffusion draws for a batch: noise levels, masks, and what each masked token counts.

A document's tokens are masked one by one with probability ``p``, which depends on a noise level
``t``, uniform in (0, 1). With ``p(t)`` the schedule, increasing from 0 to 1::

    p = (1 - eps) p(t) + eps
    -log p(x) <= E[ sum over masked i of  w(t) * -log p(x_i | masked x) ],   w(t) = p'(t) / p

On the linear schedule, ``p(t) = t``, the weight is LLaDA's ``1 / p`` (arXiv 2502.09992, eq. 3);
``poly2`` and ``cosine`` draw other ``p`` more often and weigh them less: the bound is the same.
With an exact ratio ``p`` is the share of its tokens that a row has masked. The complement of a mask
is a mask with ``1 - p``.

All draws are for the whole global batch at once: they depend neither on how it is split nor on the
devices it lies on.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..configs.objectives import BlockDiffusion, MaskedDiffusion
from ..layers.segments import is_token, segment_index, token_positions
from ..sharding import constrain, kernel_map
from .sums import Batch

# Of CART: the rate of the geometric distribution of distances, and half of it for either side.
_CART_RATE = 0.3


def add_noise(
    config: MaskedDiffusion | BlockDiffusion, model: nnx.Module, batch: Batch, key: jax.Array
) -> Batch:
    """``batch`` with what is drawn for it.

    Args:
        config: settings of the objective.
        model: its ``config`` names the mask and, where they matter, the block size, the token that
            ends a text, and whether logits are shifted.
        batch: as for ``next_token``. Tokens without ``loss_weights`` are never masked, nor is a
            document's first one where logits are shifted, since nothing predicts it.
        key: of all draws.

    Returns:
        ``tokens``, ``segment_ids`` (and ``positions``, if given); ``noisy [B, T]``, the tokens with
        masks; ``weights [B, T]`` of the masked ones, 0 elsewhere; ``counts [B, T]``, what each
        counts in the denominator; ``masked [B, T]``, where there is a mask. With complementary
        masks there are ``2 B`` rows.
    """
    cut_key, level_key, mask_key = jax.random.split(key, 3)
    batch = _whole(config, model, batch, cut_key)
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    may = is_token(segment_ids)
    if model.config.logit_shift:
        may &= token_positions(segment_ids) > 0
    may &= batch["loss_weights"] > 0
    draw = constrain(jax.random.uniform(mask_key, tokens.shape, jnp.float32), "batch", None)
    if isinstance(config, BlockDiffusion):
        t = _level_of_blocks(config, level_key, segment_ids, model.config.block_size)
    else:
        t = constrain(_levels(config, level_key, tokens.shape[:1]), "batch")[:, None]
    p, slope = mask_probability(config, t)
    masked = may & (draw < p)
    if not isinstance(config, MaskedDiffusion):
        return _finish(batch, model, masked, slope / p, batch["loss_weights"] * may)
    total = jnp.maximum(jnp.sum(may, axis=1, keepdims=True), 1)
    if config.exact_ratio:
        # The token that would be masked first; in a row without any, none.
        least = jnp.min(jnp.where(may, draw, jnp.inf), axis=1, keepdims=True)
        masked |= may & (draw == least)
        p = jnp.maximum(jnp.sum(masked, axis=1, keepdims=True), 1) / total
    if config.complementary:
        other = may & ~masked
        if config.exact_ratio:
            rest = jnp.maximum(jnp.sum(other, axis=1, keepdims=True), 1) / total
        else:
            rest = jnp.maximum(1 - p, config.eps)
        batch = {name: _pair(x, x) for name, x in batch.items()}
        masked, may, p = _pair(masked, other), _pair(may, may), _pair(p, rest)
        slope = _pair(slope, slope)
    weights, counts = slope / p, batch["loss_weights"] * may
    if config.weighting == "uniform":
        weights = jnp.ones_like(weights)
    elif config.weighting == "cart":
        weights = cart_weights(is_token(batch["segment_ids"]) & ~masked, batch["segment_ids"])
    if config.normalization == "sequence":
        mean = 1 / jnp.maximum(document_sum(counts, batch["segment_ids"]), 1e-9)
        weights, counts = weights * mean, counts * mean
    return _finish(batch, model, masked, weights, counts)


def mask_probability(
    config: MaskedDiffusion | BlockDiffusion, t: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """``(p, p'(t))``; the weight of the bound is the second over the first."""
    match config.schedule:
        case "linear":
            p, slope = t, jnp.ones_like(t)
        case "poly2":
            p, slope = t**2, 2 * t
        case "cosine":
            # The sine of the complement: exact where p is small, and the weight large.
            p, slope = jnp.sin(math.pi / 2 * t), math.pi / 2 * jnp.cos(math.pi / 2 * t)
    if getattr(config, "exact_ratio", False):
        return p, slope
    return (1 - config.eps) * p + config.eps, slope


def cart_weights(
    visible: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Of every token, the sum over visible ones ``j`` of its document of ``r (1 - r)^(d-1) / 2``.

    ``d`` is their distance in the row and ``r`` 0.3 (Dream's context-adaptive reweighting).
    """
    index = segment_index(segment_ids)

    def from_left(visible, index):
        # What a token passes on to the next: its own mass, and what came to it, faded.
        same = jnp.pad(index[:, 1:] == index[:, :-1], ((0, 0), (1, 0)))
        keep = jnp.where(same, 1 - _CART_RATE, 0.0)
        new = jnp.where(same, jnp.pad(visible[:, :-1], ((0, 0), (1, 0))), 0.0)

        def after(a, b):
            return a[0] * b[0], a[1] * b[0] + b[1]

        return jax.lax.associative_scan(after, (keep, new), axis=1)[1]

    left = from_left(visible, index)
    right = jnp.flip(from_left(jnp.flip(visible, 1), jnp.flip(index, 1)), 1)
    return _CART_RATE / 2 * (left + right)


def document_sum(x: Float[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Of every token, the sum of ``x >= 0`` over its document."""
    index, total = segment_index(segment_ids), jnp.cumsum(x, axis=1)
    last = jnp.pad(index[:, 1:] != index[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    first = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    # Sums only grow: those of a document lie between what precedes it and what it ends with.
    before = jax.lax.cummax(jnp.where(first, total - x, 0), axis=1)
    upto = jax.lax.cummin(jnp.where(last, total, jnp.inf), axis=1, reverse=True)
    return upto - before


def _whole(config, model, batch, key):
    """The batch with every field, in whole rows: documents ended by tokens, rows cut."""
    batch = {name: constrain(x, "batch", None) for name, x in batch.items()}
    tokens = batch["tokens"]
    segment_ids = batch.get("segment_ids", jnp.ones_like(tokens))
    weights = batch.get("loss_weights", jnp.ones(tokens.shape, jnp.float32)).astype(jnp.float32)
    positions = batch.get("positions")
    if config.eos_padding:
        # A token's id, and on padding that of the token before.
        own = jax.lax.associative_scan(lambda a, b: jnp.where(b != 0, b, a), segment_ids, axis=1)
        # Only as far as the longest row goes: there is no text behind it that could be shorter.
        end = jnp.max(jnp.where(segment_ids != 0, jnp.arange(1, tokens.shape[1] + 1), 0))
        if isinstance(config, BlockDiffusion):
            end = -(-end // model.config.block_size) * model.config.block_size
        own = jnp.where(jnp.arange(tokens.shape[1]) < end, own, 0)
        padding = (segment_ids == 0) & (own != 0)
        tokens = jnp.where(padding, model.config.eos_token_id, tokens)
        weights = jnp.where(padding, 1.0, weights)
        segment_ids, positions = own, None  # Positions follow from the segments.
    if isinstance(config, MaskedDiffusion) and config.random_length > 0:
        chance, length = jax.random.split(key)
        length = jax.random.randint(length, (), 1, tokens.shape[1] + 1, jnp.int32)
        cut = jax.random.uniform(chance, (), jnp.float32) < config.random_length
        kept = ~cut | (jnp.arange(tokens.shape[1]) < length)
        segment_ids = jnp.where(kept, segment_ids, 0)
    whole = {"tokens": tokens, "segment_ids": segment_ids, "loss_weights": weights}
    return whole if positions is None else whole | {"positions": positions}


def _finish(batch, model, masked, weights, counts):
    weights = jnp.where(masked, weights * batch.pop("loss_weights"), 0)
    noisy = jnp.where(masked, model.config.mask_token_id, batch["tokens"])
    drawn = {"noisy": noisy, "weights": weights, "counts": counts, "masked": masked}
    return {name: constrain(x, "batch", "seq") for name, x in (batch | drawn).items()}


def _levels(config, key, shape):
    """A noise level for each of ``shape``, one in every stratum if they are stratified."""
    places, inside = jax.random.split(key)
    t, count = jax.random.uniform(inside, shape, jnp.float32), math.prod(shape)
    if config.stratified:
        t = (jax.random.permutation(places, count).reshape(shape) + t) / count
    low, high = config.band
    return low + (high - low) * t


def _level_of_blocks(config, key, segment_ids, block_size):
    """The level of every token's block, ``[B, T]``."""
    rows, length = segment_ids.shape
    first = is_token(segment_ids) & (token_positions(segment_ids) % block_size == 0)
    number = jnp.maximum(jnp.cumsum(first, axis=1) - 1, 0)
    full, more = jax.random.split(key)
    # Short documents make more blocks than a row has without them: those have no strata.
    count = -(-length // block_size)
    low, high = config.band
    levels = jnp.concatenate(
        [
            _levels(config, full, (rows, count)),
            low + (high - low) * jax.random.uniform(more, (rows, length - count), jnp.float32),
        ],
        axis=1,
    )
    row = ("batch", None)
    pick = kernel_map(lambda x, i: jnp.take_along_axis(x, i, axis=1), (row, row), row)
    return pick(constrain(levels, *row), number)


def _pair(a, b):
    """Rows of ``a`` and ``b`` in turn; a row stays on its device."""
    both = jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])
    return constrain(both, "batch", *(None,) * (a.ndim - 1))
