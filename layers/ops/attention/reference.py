"""The oracle: one dense float32 score matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .mask import visible


def attention(q, k, v, queries, keys, *, scale, softcap, window, block):
    """See :func:`..attention`."""
    groups = q.shape[2] // k.shape[2]
    k = jnp.repeat(k.astype(jnp.float32), groups, axis=2)
    v32 = jnp.repeat(v.astype(jnp.float32), groups, axis=2)
    scores = scale * jnp.einsum("btnk,bsnk->bnts", q.astype(jnp.float32), k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = visible(queries, keys, window=window, block=block)
    scores = jnp.where(mask[:, None], scores, -1e30)
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(scores, axis=-1), v32).astype(v.dtype)
