"""Attention as XLA compiles it: query blocks one after another, so that memory is linear in T.

A block's scores against all keys are what it holds, a few times over; long keys make it smaller.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .mask import visible

_BLOCK_BYTES = 1 << 30  # Of a block's float32 scores on one device.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 512
_HIDDEN = -1e30  # Finite: a row without a visible key must not become NaN.
_FEW_ROWS = 32


def attention(q, k, v, queries, keys, *, scale, softcap, window, block):
    """See :func:`..attention`."""
    batch, length, heads, width = q.shape
    size = _query_block(batch * heads, k.shape[1])
    # Heads stand before tokens in every product: then no score is moved, forward or backward.
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def some(q, queries):
        # Queries of the heads that share keys are rows of one matrix.
        rows = jnp.swapaxes(q * scale, 1, 2).reshape(batch, k.shape[1], -1, width)
        scores = _scores(rows, k)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        mask = visible(queries, keys, window=window, block=block)
        scores = scores.reshape(batch, heads, *mask.shape[1:])
        scores = jnp.where(mask[:, None], scores, _HIDDEN)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bgrs,bgsv->bgrv", weights.reshape(*rows.shape[:3], -1), v)
        return jnp.swapaxes(out.reshape(batch, heads, q.shape[1], -1), 1, 2)

    if length <= size:
        out = some(q, queries)
    else:
        pad = -length % size

        def blocked(x):
            x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
            x = x.reshape(batch, -1, size, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        # Scores are recomputed in the backward pass instead of kept for every block.
        out = jax.lax.map(
            jax.checkpoint(lambda args: some(*args)), jax.tree.map(blocked, (q, queries))
        )
        out = jnp.moveaxis(out, 0, 1).reshape(batch, length + pad, *out.shape[3:])[:, :length]
    return out.reshape(batch, length, heads, v.shape[-1])


def _query_block(rows: int, keys: int) -> int:
    """How many queries of each of ``rows`` heads of a batch are scored at a time: a power of two.

    Layers call the operator inside ``kernel_map``, so both counts are a device's own.
    """
    fitting = _BLOCK_BYTES // (4 * rows * keys)
    power = 1 << max(fitting.bit_length() - 1, 0)
    return min(max(power, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def _scores(rows, k):
    """``rows [B, G, R, K]`` by ``k [B, G, S, K]``: ``[B, G, R, S]`` float32."""
    if rows.shape[2] > _FEW_ROWS:
        return jnp.einsum("bgrk,bgsk->bgrs", rows, k, preferred_element_type=jnp.float32)
    # Few queries, as in decoding, stand right: XLA's CPU backend packs what stands there anew, and
    # this should not be the whole cache.
    scores = jnp.einsum("bgsk,bgrk->bgsr", k, rows, preferred_element_type=jnp.float32)
    return jnp.swapaxes(scores, 2, 3)
