"""The oracle: one dense float32 score matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def latent_decode_reference(q, latent, counts, *, value_dim, scale):
    """See :func:`..latent_decode`."""
    slots = jnp.arange(latent.shape[1])
    seen = slots < counts[:, :, None]  # [B, T, S]
    # A row's slots that none of its queries sees may hold anything, NaN included.
    latent = jnp.where(seen.any(axis=1)[:, :, None], latent, 0).astype(jnp.float32)
    scores = scale * jnp.einsum("btnc,bsc->btns", q.astype(jnp.float32), latent)
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -1e30), axis=-1)
    weights = jnp.where(seen[:, :, None], weights, 0)
    return jnp.einsum("btns,bsv->btnv", weights, latent[..., :value_dim]).astype(q.dtype)
