"""Multi-head latent attention without positions (NoPE), caching only the latent.

DeepSeek-V2 (arXiv 2405.04434) section 2.1, as Kimi Linear uses it: the "rope" part of queries and
keys is kept but never rotated.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..sharding import constrain, einsum, kernel_map
from .linear import Linear
from .norm import RMSNorm
from .ops.attention import attention
from .ops.latent_decode import latent_decode
from .segments import is_token, segment_index

# With a cache, at least this many new tokens make it cheaper to expand the cached latents to keys
# and values than to score each query against the (wider) latents themselves.
_EXPAND_FROM = 16
# Tokens of a batch that are written one by one, where that is better, at most.
_FEW_TOKENS = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLACache:
    """The latents read so far: ``[B, S, kv_lora_rank + qk_rope_head_dim]``, by position."""

    latent: Any  # an array, or what stands for it in a tree of shapes or shardings


class LatentAttention(nnx.Module):
    """Multi-head latent attention (NoPE).

    Args:
        features: model width D.
        num_heads: query heads N.
        kv_lora_rank: width of the normed latent that keys and values are expanded from.
        qk_nope_head_dim: width of a head's own key.
        qk_rope_head_dim: width of the key that all heads share (never rotated here).
        v_head_dim: width of a head's value.
        latent_epsilon: of the latent's norm; the published models use 1e-6 here, not the model's.
        implementation: of attention over expanded keys and values; None picks by platform.
        decode_implementation: of :func:`~.ops.latent_decode.latent_decode`, which reads the cache
            for a few new tokens; None picks by platform.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rngs: nnx.Rngs,
        latent_epsilon: float = 1e-6,
        stddev: float = 0.02,
        implementation: str | None = None,
        decode_implementation: str | None = None,
    ):
        model, init = {"embed": features}, {"rngs": rngs, "stddev": stddev}

        def heads(width):
            return {"heads": num_heads, "head_dim": width}

        self.q_proj = Linear(model, heads(qk_nope_head_dim + qk_rope_head_dim), **init)
        self.kv_a_proj = Linear(model, {"latent": kv_lora_rank + qk_rope_head_dim}, **init)
        self.kv_a_norm = RMSNorm(kv_lora_rank, epsilon=latent_epsilon, axis="latent")
        self.kv_b_proj = Linear(
            {"latent": kv_lora_rank}, heads(qk_nope_head_dim + v_head_dim), **init
        )
        self.o_proj = Linear(heads(v_head_dim), model, **init)
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.scale = 1 / math.sqrt(qk_nope_head_dim + qk_rope_head_dim)
        self.implementation = implementation
        self.decode_implementation = decode_implementation

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike) -> MLACache:
        """Room for ``max_length`` tokens of each of ``batch`` sequences."""
        width = self.kv_a_proj.kernel.shape[-1]
        latent = jnp.zeros((batch, max_length, width), dtype)
        return MLACache(latent=constrain(latent, "batch", None, None))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: MLACache | None = None,
        *,
        length: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MLACache | None]:
        """Mix over time.

        Args:
            x: normalised activations.
            cache: of the tokens before; None starts from nothing and returns no cache.
            length: tokens that each row's cache holds; with a cache only.
            segment_ids: 0 is padding. With a cache a row is one sequence: its tokens stand first
                and padding, if any, after them.
        """
        q = self.q_proj(x)
        latent = self._latent(x)
        if cache is None:
            o = self._expanded(q, latent, *_own_context(x, segment_ids))
            return self.o_proj(o), None
        valid = None if segment_ids is None else is_token(segment_ids)
        cache = MLACache(
            latent=write_rows(
                cache.latent,
                latent,
                length,
                valid,
                one_by_one=self.decode_implementation == "pallas_tpu",
            )
        )
        positions = length[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        if x.shape[1] < _EXPAND_FROM:
            return self.o_proj(self._absorbed(q, cache.latent, positions)), cache
        batch, capacity, _ = cache.latent.shape
        slots = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (batch, capacity))
        o = self._expanded(q, cache.latent.astype(x.dtype), positions, slots, None)
        return self.o_proj(o), cache

    def _latent(self, x):
        """What is cached of a token: its normed latent, and the shared key beside it."""
        c, k_shared = jnp.split(self.kv_a_proj(x), [self.kv_lora_rank], axis=-1)
        return jnp.concatenate([self.kv_a_norm(c), k_shared], axis=-1)

    def _expanded(self, q, latent, query_positions, key_positions, segments):
        """Keys and values of every head, then attention: fewest products for long queries."""
        c, k_shared = jnp.split(latent, [self.kv_lora_rank], axis=-1)
        k, v = jnp.split(self.kv_b_proj(c), [self.qk_nope_head_dim], axis=-1)
        k_shared = jnp.broadcast_to(k_shared[:, :, None], (*k.shape[:3], k_shared.shape[-1]))
        k_shared = constrain(k_shared, "batch", "seq", "heads", "head_dim")
        k = jnp.concatenate([k, k_shared], axis=-1)
        own, row = ("batch", None, "heads", None), ("batch", None)

        def run(q, k, v, query_positions, key_positions, *segments):
            return attention(
                q,
                k,
                v,
                query_positions=query_positions,
                key_positions=key_positions,
                query_segments=segments[0] if segments else None,
                key_segments=segments[0] if segments else None,
                scale=self.scale,
                implementation=self.implementation,
            )

        extra = () if segments is None else (segments,)
        return kernel_map(run, (own, own, own, row, row, *(row for _ in extra)), own)(
            q, k, v, query_positions, key_positions, *extra
        )

    def _absorbed(self, q, latent, positions):
        """Queries carried into the latent space: attention reads the cache itself, once."""
        w_k, w_v = jnp.split(self.kv_b_proj.weight(q.dtype), [self.qk_nope_head_dim], axis=-1)
        q, q_shared = jnp.split(q, [self.qk_nope_head_dim], axis=-1)
        heads = ("batch", "seq", "heads", None)
        q = jnp.concatenate([einsum("btnk,cnk->btnc", q, w_k, heads), q_shared], axis=-1)

        def run(q, latent, positions):
            return latent_decode(
                q,
                latent,
                positions=positions,
                value_dim=self.kv_lora_rank,
                scale=self.scale,
                implementation=self.decode_implementation,
            )

        own, row = ("batch", None, "heads", None), ("batch", None)
        o = kernel_map(run, (own, (*row, None), row), own)(q, latent, positions)
        return einsum("btnc,cnv->btnv", o, w_v, heads)


def _own_context(x, segment_ids):
    """Positions and segments of tokens that attend among themselves."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    if segment_ids is None:
        return positions, positions, None
    # Padding is a segment of its own: no token sees it.
    segments = jnp.where(is_token(segment_ids), segment_index(segment_ids), -1)
    return positions, positions, segments


def write_rows(
    buffer: Float[Array, "B S C"],
    new: Float[Array, "B T C"],
    start: Int[Array, "B"],
    valid: Bool[Array, "B T"] | None = None,
    *,
    one_by_one: bool = False,
) -> Float[Array, "B S C"]:
    """``buffer`` with each row's ``new`` tokens written from its ``start`` on.

    Tokens that are not ``valid`` and positions past the buffer's end are dropped. ``one_by_one``
    writes few tokens by as many updates, for who reads the buffer as it lies: XLA for TPU gives a
    scatter's operand another layout, and would copy the whole cache between the two at every step.
    """

    def write(buffer, new, start, *valid):
        positions = start[:, None] + jnp.arange(new.shape[1], dtype=start.dtype)
        if valid:
            positions = jnp.where(valid[0], positions, buffer.shape[1])
        new = new.astype(buffer.dtype)
        few = one_by_one and positions.size <= _FEW_TOKENS
        return (_write_each if few else _scatter)(buffer, new, positions)

    row = ("batch", None, None)
    extra = () if valid is None else (valid,)
    axes = (row, row, row[:1], *(row[:2] for _ in extra))
    return kernel_map(write, axes, row)(buffer, new, start, *extra)


def _scatter(buffer, new, positions):
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, positions].set(new, mode="drop")


def _write_each(buffer, new, positions):
    """What :func:`_scatter` does, by updates that suit any layout of the buffer in memory."""
    capacity = buffer.shape[1]
    for row, token in itertools.product(*map(range, positions.shape)):
        slot = jnp.minimum(positions[row, token], capacity - 1)
        at = (jnp.asarray(row, slot.dtype), slot, jnp.zeros_like(slot))
        old = jax.lax.dynamic_slice(buffer, at, (1, 1, buffer.shape[2]))
        one = jnp.where(positions[row, token] < capacity, new[row, token], old)
        buffer = jax.lax.dynamic_update_slice(buffer, one, at)
    return buffer
