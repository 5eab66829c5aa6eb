"""Latent decoding as XLA compiles it: blocks of the cache, one after another, up to the last used.

A block is read for its scores, while it is in a CPU's cache, and again for its values. On a GPU
every turn of the loop waits for the host, as the data decide how many there are: there, blocks are
as large as leaves few of them, and the scores of one no more than :data:`_GPU_SCORES` numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ..platform import by_platform
from .partial import HIDDEN, part

_BLOCK = 512
_GPU_TURNS, _GPU_SCORES = 16, 2**24


def latent_decode_xla(q, latent, counts, *, value_dim, scale):
    """See :func:`..latent_decode`."""
    blocks = {"default": min(_BLOCK, latent.shape[1]), "cuda": _gpu_block(q, latent)}
    if blocks["cuda"] == blocks["default"]:
        del blocks["cuda"]
    run = by_platform({p: functools.partial(_by_blocks, block) for p, block in blocks.items()})
    return run(q, latent, counts, value_dim=value_dim, scale=scale)


def _gpu_block(q, latent) -> int:
    """Slots of a block on a GPU, a multiple of the one elsewhere unless it is the whole cache."""
    batch, length, heads, _ = q.shape
    wanted = -(-latent.shape[1] // _GPU_TURNS)
    most = _GPU_SCORES // (batch * length * heads)
    block = max(_BLOCK, min(wanted, most) // _BLOCK * _BLOCK)
    return min(block, latent.shape[1])


def _by_blocks(block, q, latent, counts, *, value_dim, scale):
    batch, length, heads, _ = q.shape
    capacity, rows = latent.shape[1], length * heads
    q = q.reshape(batch, rows, -1)
    seen_by = jnp.repeat(counts, heads, axis=1)[:, :, None]  # [B, R, 1]
    end = jnp.max(counts, axis=1)

    def add(step, carry):
        total, top, acc = carry
        # The last block begins earlier rather than end outside; what it repeats is hidden.
        first = jnp.minimum(step * block, capacity - block)
        slots = first + jnp.arange(block, dtype=jnp.int32)
        some = jax.lax.dynamic_slice_in_dim(latent, first, block, axis=1).astype(q.dtype)
        some = jnp.where((slots < end[:, None])[:, :, None], some, 0)
        seen = (slots >= step * block) & (slots < seen_by)
        # Queries stand right: XLA's CPU backend packs what stands there anew.
        scores = jnp.einsum("bsc,brc->bsr", some, q, preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scale * jnp.swapaxes(scores, 1, 2), HIDDEN)
        new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights, old = jnp.exp(scores - new), jnp.exp(top - new)
        total = old * total + jnp.sum(weights, axis=-1, keepdims=True)
        # All columns: a slice of the block would be one more copy of it.
        values = jnp.einsum(
            "brs,bsc->brc", weights.astype(q.dtype), some, preferred_element_type=jnp.float32
        )
        return total, new, old * acc + values

    carry = (
        jnp.zeros((batch, rows, 1), jnp.float32),
        jnp.full((batch, rows, 1), HIDDEN, jnp.float32),
        jnp.zeros((batch, rows, latent.shape[2]), jnp.float32),
    )
    if block == capacity:
        carry = add(0, carry)
    else:
        steps = jax.lax.div(jnp.max(end) + (block - 1), jnp.int32(block))
        carry = jax.lax.fori_loop(0, steps, add, carry)
    o, _ = part(*carry)
    return o[..., :value_dim].astype(q.dtype).reshape(batch, length, heads, value_dim)
