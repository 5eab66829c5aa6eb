"""Masked diffusion: the model names the tokens under the masks, each weighted by what was drawn.

What is drawn, and the equations, are in :mod:`.noise`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ..configs.objectives import BlockDiffusion, MaskedDiffusion
from ..sharding import constrain
from .cross_entropy import cross_entropy
from .noise import add_noise
from .sums import Batch, Sums


def diffusion(
    config: MaskedDiffusion | BlockDiffusion, model: nnx.Module, batch: Batch, key: jax.Array
) -> Sums:
    """Weighted cross-entropy of all masked tokens (nats).

    Args:
        config: its settings.
        model: has ``hidden_states``, ``logits`` and a ``config`` that names its mask.
        batch: as :func:`.noise.add_noise` returns it; or as for ``next_token``, and it is called.
        key: of what is drawn, where ``batch`` has no ``noisy``.

    Returns:
        Sums; the metrics are ``nll``, the loss but for the sharpening (of weighting ``"bound"``: a
        bound on the negative log-likelihood of a token), ``accuracy`` (greedy, weighted as the loss
        is) and ``masked``, the share of tokens that were; with ``config.sharpening`` also
        ``entropy``, of masked tokens that are guessed right, per token that could have been masked.
    """
    if "noisy" not in batch:
        batch = add_noise(config, model, batch, key)
    clean = {"clean": batch["tokens"]} if isinstance(config, BlockDiffusion) else {}
    hidden, _, stats = model.hidden_states(
        batch["noisy"],
        segment_ids=batch.get("segment_ids"),
        positions=batch.get("positions"),
        **clean,
    )
    targets, weights, counts = batch["tokens"], batch["weights"], batch["counts"]
    masked = counts * batch["masked"]
    sharpen = masked if config.sharpening else None
    if model.config.logit_shift:
        # What a row ends with wraps to its start, where no first token is ever masked.
        targets, weights = _following(targets), _following(weights)
        sharpen = None if sharpen is None else _following(sharpen)
    loss, sums = cross_entropy(
        model,
        hidden,
        targets,
        weights,
        max_logits=config.max_logits,
        sharpen=sharpen,
        sharpening=config.sharpening,
    )
    metrics = {name: sums[name] for name in ("nll", "accuracy")}
    metrics["masked"] = jnp.sum(masked)
    if sharpen is not None:
        metrics["entropy"] = sums["entropy"]
    return loss, jnp.sum(counts), metrics | {"stats": stats}


def _following(x):
    # A shift along a dimension that may be sharded; these arrays are small.
    return constrain(jnp.roll(constrain(x, "batch", None), -1, axis=1), "batch", "seq")
