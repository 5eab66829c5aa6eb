"""Softmax attention with grouped keys; window, soft cap, rotary part and biases are arguments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..errors import InputError
from ..sharding import constrain, kernel_map, mesh_axes_of
from .linear import Linear
from .ops.attention import attention
from .rotary import rotate
from .segments import is_token, segment_index, token_positions

# The position of a key that no query may see. Differences of two of them fit an int32.
_NOWHERE = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values, each ``[B, S, G, K]``.

    Slot ``s`` holds the token at position ``s``; where ``S`` is the layer's window, the newest
    token whose position is ``s`` modulo ``S`` (a ring).
    """

    k: Any  # arrays, or what stands for them in a tree of shapes or shardings
    v: Any


class Attention(nnx.Module):
    """Causal multi-head attention whose query heads share ``num_kv_heads`` keys and values.

    Args:
        features: model width D.
        num_heads: query heads N.
        num_kv_heads: heads G of keys and values; N if None.
        head_dim: width K of a head.
        scale: of the scores; ``head_dim ** -0.5`` if None.
        softcap: see :func:`~.ops.attention.attention`.
        window: tokens that a query sees, itself included; None is all before it.
        rotary_dim: dimensions of a head that carry the position, the first ones; None is none.
        rotary_theta: base of their frequencies.
        use_bias: biases on all four projections.
        implementation: of the operator; None picks by platform.

    Raises:
        InputError: sizes that do not fit each other.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        head_dim: int,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        rotary_dim: int | None = None,
        rotary_theta: float = 10000.0,
        use_bias: bool = False,
        stddev: float = 0.02,
        implementation: str | None = None,
    ):
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise InputError(f"{num_heads=} is not a multiple of {num_kv_heads=}")
        if rotary_dim is not None and (rotary_dim % 2 or not 0 < rotary_dim <= head_dim):
            raise InputError(
                f"{rotary_dim=} must be even and in 2..{head_dim=}; None rotates nothing"
            )
        if window is not None and window < 1:
            raise InputError(f"{window=} must be at least 1; None sees every token before it")
        model, init = {"embed": features}, {"rngs": rngs, "stddev": stddev, "use_bias": use_bias}
        queries = {"heads": num_heads, "head_dim": head_dim}
        keys = {"kv_heads": num_kv_heads, "head_dim": head_dim}
        self.q_proj = Linear(model, queries, **init)
        self.k_proj = Linear(model, keys, **init)
        self.v_proj = Linear(model, keys, **init)
        self.o_proj = Linear(queries, model, **init)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = 1 / math.sqrt(head_dim) if scale is None else scale
        self.softcap = softcap
        self.window = window
        self.rotary_dim, self.rotary_theta = rotary_dim, rotary_theta
        self.implementation = implementation

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike) -> KVCache:
        """Room for ``max_length`` tokens of each of ``batch`` rows, or for the window's."""
        slots = max_length if self.window is None else min(max_length, self.window)
        empty = jnp.zeros((batch, slots, self.num_kv_heads, self.head_dim), dtype)
        empty = constrain(empty, "batch", None, "kv_heads", None)
        return KVCache(k=empty, v=empty)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache | None = None,
        *,
        length: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Mix over time.

        Args:
            x: normalised activations.
            cache: of the tokens before; None starts from nothing and returns no cache.
            length: tokens that each row has read before; with a cache only.
            segment_ids: 0 is padding. With a cache a row is one sequence: its tokens stand first
                and padding, if any, after them.
            positions: by which queries and keys are rotated; if None, how many tokens of its own
                segment stand before each token. What is seen never depends on them.
        """
        places = _places(x, length, segment_ids)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.rotary_dim is not None:
            angles = constrain(places if positions is None else positions, "batch", "seq")
            q, k = (rotate(y, angles, self.rotary_dim, self.rotary_theta) for y in (q, k))
        if cache is None:
            segments = None
            if segment_ids is not None:
                # Padding is a segment of its own: no token sees it.
                segments = jnp.where(is_token(segment_ids), segment_index(segment_ids), -1)
            return self.o_proj(self._attend(q, k, v, places, places, segments)), None
        count = jnp.full_like(length, x.shape[1])
        if segment_ids is not None:
            count = is_token(segment_ids).sum(axis=1, dtype=length.dtype)
        if self.window is not None and self.window == cache.k.shape[1]:
            o, cache = self._ring(q, k, v, cache, places, length, count)
        else:
            # Every position has its slot, and a window has seen no more than there are slots.
            cache = _write(cache, k, v, places, places < (length + count)[:, None])
            keys = jnp.broadcast_to(jnp.arange(cache.k.shape[1]), cache.k.shape[:2])
            o = self._attend(q, cache.k, cache.v, places, keys)
        return self.o_proj(o), cache

    def _ring(self, q, k, v, cache, places, length, count):
        """Attention where slots are used again: ``count`` new tokens a row after ``length``."""
        slots, end = cache.k.shape[1], (length + count)[:, None]
        # Of the tokens that share a slot only the last is written.
        written = (places < end) & (places >= end - slots)
        new = _write(cache, k, v, places % slots, written)
        if q.shape[1] == 1:
            # What the token overwrites is just outside its window.
            return self._attend(q, new.k, new.v, places, _held(slots, end)), new
        k, v = (constrain(y, "batch", None, "kv_heads", None) for y in (k, v))
        keys = jnp.concatenate([cache.k.astype(k.dtype), k], axis=1)
        values = jnp.concatenate([cache.v.astype(v.dtype), v], axis=1)
        own = jnp.where(places < end, places, _NOWHERE)
        seen = jnp.concatenate([_held(slots, length[:, None]), own], axis=1)
        return self._attend(q, keys, values, places, seen), new

    def _attend(self, q, k, v, query_positions, key_positions, segments=None):
        own, kv = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        row = ("batch", None)

        def run(q, k, v, query_positions, key_positions, *segments):
            k, v = (self._local_heads(q, y) for y in (k, v))
            return attention(
                q,
                k.astype(q.dtype),
                v.astype(q.dtype),
                query_positions=query_positions,
                key_positions=key_positions,
                query_segments=segments[0] if segments else None,
                key_segments=segments[0] if segments else None,
                scale=self.scale,
                softcap=self.softcap,
                window=self.window,
                implementation=self.implementation,
            )

        extra = () if segments is None else (segments,)
        return kernel_map(run, (own, kv, kv, row, row, *(row for _ in extra)), own)(
            q, k, v, query_positions, key_positions, *extra
        )

    def _local_heads(self, q, y):
        """Of keys or values on one device, the heads that its query heads read, in their order."""
        queries, keys = q.shape[2], y.shape[2]
        if queries * self.num_kv_heads == keys * self.num_heads:
            return y
        if keys != self.num_kv_heads:
            raise InputError(
                "rules.kv_heads splits the heads of keys otherwise than rules.heads those of "
                "queries; give both the same mesh axes, or leave kv_heads whole (None)"
            )
        # Queries are split and keys are not. As many neighbours as divide both a device's heads
        # and a group's have one key head in common.
        group = self.num_heads // self.num_kv_heads
        first = jax.lax.axis_index(mesh_axes_of("heads")) * queries
        together = math.gcd(queries, group)
        return jnp.take(y, (first + jnp.arange(0, queries, together)) // group, axis=2)


def _places(x, length, segment_ids):
    """Each token's position among the tokens of its sequence, ``[B, T]`` int32."""
    if length is None and segment_ids is not None:
        return token_positions(segment_ids)
    offsets = jnp.arange(x.shape[1], dtype=jnp.int32)
    if length is None:
        return jnp.broadcast_to(offsets, x.shape[:2])
    return length[:, None] + offsets


def _held(slots, end):
    """The position that each slot of a ring holds once ``end [B, 1]`` tokens have been written."""
    newest = end - 1
    held = newest - (newest - jnp.arange(slots, dtype=jnp.int32)) % slots
    return jnp.where(held < 0, _NOWHERE, held)


def _write(cache, k, v, slots, written):
    """``cache`` with new keys and values at ``slots [B, T]`` where ``written``.

    Slots beyond the buffer's end are dropped; those that are written differ within a row.
    """

    def put(buffer, new, slots, written):
        rows = jnp.arange(buffer.shape[0])[:, None]
        slots = jnp.where(written, slots, buffer.shape[1])
        return buffer.at[rows, slots].set(new.astype(buffer.dtype), mode="drop")

    row = ("batch", None, "kv_heads", None)
    put = kernel_map(put, (row, row, row[:2], row[:2]), row)
    return KVCache(*(put(b, n, slots, written) for b, n in ((cache.k, k), (cache.v, v))))
