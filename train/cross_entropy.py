"""Cross-entropy over a large vocabulary: weighted sums, taken in chunks of the sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .layout import split_rows
from .sums import num_chunks


def cross_entropy(
    logits_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    max_logits: int = 2**27,
    sharpen: Float[Array, "B T"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Weighted sums ``nll``, ``z_loss`` and ``accuracy`` over all positions, float32.

    With weights ``sharpen`` also ``entropy``, of the positions where the likeliest token is the
    target.

    At most about ``max_logits`` logits of a device exist at once, in the backward pass too: longer
    sequences are taken in equal chunks, whose logits are computed again for the gradient. Chunks
    divide the sequence length; one with few divisors makes them smaller than need be.
    """
    vocab_size = jax.eval_shape(logits_of, hidden).shape[-1]
    chunks = num_chunks(*targets.shape, vocab_size, max_logits, ("batch", "seq", "vocab"))
    sums = functools.partial(_token_sums, logits_of, z_loss)
    if chunks == 1:
        return sums(hidden, targets, weights, sharpen)
    given = (hidden, targets, weights, *(() if sharpen is None else (sharpen,)))
    parts = [split_rows(x, chunks, axis=1) for x in given]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total, part):
        return jax.tree.map(jnp.add, total, sums(*part)), None

    names = ("nll", "z_loss", "accuracy", *(() if sharpen is None else ("entropy",)))
    zero = dict.fromkeys(names, jnp.float32(0))
    return jax.lax.scan(body, zero, parts)[0]


def _token_sums(logits_of, z_loss, hidden, targets, weights, sharpen=None):
    logits = logits_of(hidden).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum instead of a gather: it stays local where the vocabulary is sharded.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    nll = log_z - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    right = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == targets
    found = {
        "nll": jnp.sum(weights * nll),
        "z_loss": z_loss * jnp.sum(weights * log_z**2),
        "accuracy": jnp.sum(weights * right),
    }
    if sharpen is not None:
        p = jnp.exp(logits - log_z[..., None])
        found["entropy"] = jnp.sum(sharpen * right * (log_z - jnp.sum(p * logits, axis=-1)))
    return found
