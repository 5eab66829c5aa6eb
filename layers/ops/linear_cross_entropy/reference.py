"""The oracle: all logits at once in float32, differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .terms import Terms


def linear_cross_entropy_reference(
    hidden, kernel, targets, weights, sharpen, *, terms: Terms, softcap, vocab_first, chunk_size
):
    """See :func:`..linear_cross_entropy`; chunks do not occur."""
    del chunk_size
    kernel = kernel.T if vocab_first else kernel
    logits = jnp.einsum(
        "btd,dv->btv",
        hidden.astype(jnp.float32),
        kernel.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    right = jnp.max(log_p, axis=-1) == -nll
    sums = {
        "nll": jnp.sum(weights * nll),
        "z_loss": terms.z_loss * jnp.sum(weights * log_z**2),
        "accuracy": jnp.sum(weights * right),
    }
    if sharpen is not None:
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        sums["entropy"] = jnp.sum(sharpen * right * entropy)
    loss = sums["nll"] + sums["z_loss"] + terms.sharpening * sums.get("entropy", 0.0)
    return loss, jax.lax.stop_gradient({name: sums[name] for name in terms.names})
