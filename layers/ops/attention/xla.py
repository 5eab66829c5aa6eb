"""Attention as XLA compiles it: query blocks one after another, so that memory is linear in T."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_QUERY_BLOCK = 512
_HIDDEN = -1e30  # Finite: a row without a visible key must not become NaN.


def attention(q, k, v, query_positions, key_positions, query_segments, key_segments, scale):
    """See :func:`..attention`."""
    batch, length, heads, width = q.shape
    q = (q * scale).reshape(batch, length, k.shape[2], heads // k.shape[2], width)

    def block(q, positions, segments):
        scores = jnp.einsum("btgnk,bsgk->bgnts", q, k, preferred_element_type=jnp.float32)
        mask = key_positions[:, None, :] <= positions[:, :, None]
        if segments is not None:
            mask &= key_segments[:, None, :] == segments[:, :, None]
        scores = jnp.where(mask[:, None, None], scores, _HIDDEN)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bgnts,bsgv->btgnv", weights, v)

    if length <= _QUERY_BLOCK:
        out = block(q, query_positions, query_segments)
    else:
        pad = -length % _QUERY_BLOCK

        def blocked(x):
            if x is None:
                return None
            x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
            x = x.reshape(batch, -1, _QUERY_BLOCK, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        # Scores are recomputed in the backward pass instead of kept for every block.
        out = jax.lax.map(
            jax.checkpoint(lambda args: block(*args)),
            (blocked(q), blocked(query_positions), blocked(query_segments)),
        )
        out = jnp.moveaxis(out, 0, 1).reshape(batch, length + pad, *out.shape[3:])[:, :length]
    return out.reshape(batch, length, heads, v.shape[-1])
