"""Objectives: from a model and a batch to sums (see :mod:`.sums`), which the step divides once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ..configs.objectives import (
    AutoDeco,
    BlockDiffusion,
    MaskedDiffusion,
    NextToken,
    NextVector,
    Objective,
    Reconstruction,
)
from .autodeco import autodeco
from .cross_entropy import cross_entropy
from .diffusion import diffusion
from .next_vector import next_vector
from .noise import add_noise
from .reconstruction import reconstruction
from .sums import Batch, Sums, shift, with_row_keys

ObjectiveFn = Callable[[nnx.Module, Batch, jax.Array], Sums]
DrawFn = Callable[[nnx.Module, Batch, jax.Array], Batch]


def make_objective(config: Objective, training: bool = True) -> ObjectiveFn:
    """The function that these settings describe; ``training`` is False for an evaluation."""
    match config:
        case NextToken():
            return functools.partial(next_token, config)
        case AutoDeco():
            return functools.partial(autodeco, config)
        case MaskedDiffusion() | BlockDiffusion():
            return functools.partial(diffusion, config)
        case Reconstruction():
            return functools.partial(reconstruction, config, training=training)
        case NextVector():
            return functools.partial(next_vector, config)
    raise TypeError(f"no objective for {config!r}")


def make_draw(config: Objective) -> DrawFn:
    """``draw(model, batch, key)``: the whole global batch with all that is drawn for it.

    It is called before the batch is split for accumulation, so nothing drawn depends on that.
    """
    match config:
        case MaskedDiffusion() | BlockDiffusion():
            return functools.partial(add_noise, config)
    return lambda model, batch, key: with_row_keys(batch, key)


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
    loss, sums = cross_entropy(
        model,
        hidden,
        targets,
        weights,
        z_loss=config.z_loss,
        max_logits=config.max_logits,
    )
    return loss, jnp.sum(weights), sums | {"stats": stats}
