"""Softmax attention with grouped keys; blocks, window, soft cap, rotary part are arguments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..errors import InputError
from ..sharding import constrain, kernel_map, mesh_axes_of
from .linear import Linear
from .ops.attention import Marks, attention
from .ops.attention.mask import visible
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
    """Multi-head attention whose query heads share ``num_kv_heads`` keys and values.

    Args:
        features: model width D.
        num_heads: query heads N.
        num_kv_heads: heads G of keys and values; N if None.
        head_dim: width K of a head.
        scale: of the scores; ``head_dim ** -0.5`` if None.
        softcap: see :func:`~.ops.attention.attention`.
        window: tokens that a query sees, itself included; None is all before it.
        block: tokens of a document that see each other whole, beside all of earlier blocks: 1 is
            causal, None bidirectional.
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
        block: int | None = 1,
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
        if block is not None and block < 1:
            raise InputError(f"{block=} must be at least 1 (causal); None is bidirectional")
        if window is not None and block != 1:
            raise InputError(f"{window=} is of causal attention (block=1), not {block=}")
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
        self.block = block
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
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        slots: Int[Array, "B T"] | None = None,
        two_views: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Mix over time.

        Args:
            x: normalised activations.
            cache: of the tokens before; None starts from nothing and returns no cache.
            length: slots of each row that are filled; with a cache only.
            segment_ids: 0 is padding. With a cache a row is one sequence, whose tokens stand first
                and padding, if any, after them; tokens with ``slots`` stand as they like.
            positions: by which queries and keys are rotated; if None, how many tokens of its own
                segment stand before each token. What is seen never depends on them.
            slots: with a cache, where in it the tokens are: their positions in the sequence, all
                different within a row. They overwrite what is there and see the filled slots up to
                the end of their block, those that this call fills first included; no gap may be
                left. If None, they come after ``length``.
            two_views: ``x`` is a noisy view of each row and then, as long, the clean one; see
                :func:`~.ops.attention.attention`. Segments and positions are those of one view.

        Raises:
            InputError: ``slots`` without a cache or into a window's ring, two views with a cache.
        """
        if (two_views and cache is not None) or (slots is not None and cache is None):
            raise InputError("attention: two_views are without a cache, and slots are of a cache")
        views = 2 if two_views else 1
        places = _places(x.shape[1] // views, length, segment_ids, x) if slots is None else slots
        angles = constrain(places if positions is None else positions, "batch", "seq")
        q, k, v = self.heads(x, _twice(angles, views))
        if cache is None:
            segments = None
            if segment_ids is not None:
                # Padding is a segment of its own: no token sees it.
                segments = jnp.where(is_token(segment_ids), segment_index(segment_ids), -1)
                segments = _twice(segments, views)
            noisy = None
            if two_views:
                noisy = jnp.broadcast_to(jnp.arange(x.shape[1]) < x.shape[1] // 2, x.shape[:2])
            own = Marks(_twice(places, views), segments, noisy)
            return self.o_proj(self.attend(q, k, v, own, own)), None
        count = jnp.full_like(length, x.shape[1])
        if segment_ids is not None:
            count = is_token(segment_ids).sum(axis=1, dtype=length.dtype)
        if self.window is not None and self.window == cache.k.shape[1]:
            if slots is not None:
                raise InputError("attention: a window's ring takes tokens in their order, no slots")
            o, cache = self._ring(q, k, v, cache, places, length, count)
            return self.o_proj(o), cache
        # Every position has its slot, and a window has seen no more than there are slots.
        end = length + count
        written = places < end[:, None]
        if slots is not None:
            written = True if segment_ids is None else is_token(segment_ids)
            written = jnp.broadcast_to(written, places.shape)
            end = filled(length, slots, written)
        cache = _write(cache, k, v, places, written)
        keys = jnp.broadcast_to(jnp.arange(cache.k.shape[1]), cache.k.shape[:2])
        # A causal query after all that is filled sees nothing that is not.
        segments = seen = None
        if self.block != 1 or slots is not None:
            segments, seen = jnp.zeros_like(places), jnp.where(keys < end[:, None], 0, -1)
        o = self.attend(q, cache.k, cache.v, Marks(places, segments), Marks(keys, seen))
        return self.o_proj(o), cache

    def heads(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Queries, keys and values of normalised activations, the first two rotated."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.rotary_dim is not None:
            q, k = (rotate(y, positions, self.rotary_dim, self.rotary_theta) for y in (q, k))
        return q, k, v

    def queries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T N K"]:
        """The queries alone of what :meth:`heads` gives."""
        q = self.q_proj(x)
        if self.rotary_dim is None:
            return q
        return rotate(q, positions, self.rotary_dim, self.rotary_theta)

    def _ring(self, q, k, v, cache, places, length, count):
        """Attention where slots are used again: ``count`` new tokens a row after ``length``."""
        slots, end = cache.k.shape[1], (length + count)[:, None]
        # Of the tokens that share a slot only the last is written.
        written = (places < end) & (places >= end - slots)
        new = _write(cache, k, v, places % slots, written)
        if q.shape[1] == 1:
            # What the token overwrites is just outside its window.
            return self.attend(q, new.k, new.v, Marks(places), Marks(_held(slots, end))), new
        k, v = (constrain(y, "batch", None, "kv_heads", None) for y in (k, v))
        keys = jnp.concatenate([cache.k.astype(k.dtype), k], axis=1)
        values = jnp.concatenate([cache.v.astype(v.dtype), v], axis=1)
        own = jnp.where(places < end, places, _NOWHERE)
        seen = jnp.concatenate([_held(slots, length[:, None]), own], axis=1)
        return self.attend(q, keys, values, Marks(places), Marks(seen)), new

    def attend(
        self,
        q: Float[Array, "B T N K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G K"],
        queries: Marks,
        keys: Marks,
    ) -> Float[Array, "B T N K"]:
        """The operator on what :meth:`heads` gives; ``o_proj`` is still to come."""
        own, kv = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        marks, treedef = jax.tree.flatten((queries, keys))

        def run(q, k, v, *marks):
            queries, keys = jax.tree.unflatten(treedef, marks)
            k, v = (self._local_heads(q, y) for y in (k, v))
            return attention(
                q,
                k.astype(q.dtype),
                v.astype(q.dtype),
                query_positions=queries.positions,
                key_positions=keys.positions,
                query_segments=queries.segments,
                key_segments=keys.segments,
                query_noisy=queries.noisy,
                key_noisy=keys.noisy,
                block=self.block,
                scale=self.scale,
                softcap=self.softcap,
                window=self.window,
                implementation=self.implementation,
            )

        rows = (("batch", None),) * len(marks)
        return kernel_map(run, (own, kv, kv, *rows), own)(q, k, v, *marks)

    def probabilities(
        self,
        q: Float[Array, "B T N K"],
        k: Float[Array, "B S G K"],
        queries: Marks,
        keys: Marks,
    ) -> Float[Array, "B N T S"]:
        """The weight of each key in each query's average, float32: for few queries, as it is big.

        A query that sees no key has any weights.
        """

        def run(q, k, *marks):
            k = self._local_heads(q, k)
            rows, length, heads, dim = q.shape
            # Heads first, and queries left of the keys, or XLA turns every matrix of scores twice.
            few = jnp.swapaxes(q * self.scale, 1, 2).reshape(rows, k.shape[2], -1, dim)
            scores = jax.lax.dot_general(
                few,
                jnp.swapaxes(k, 1, 2),
                (((3,), (3,)), ((0, 1), (0, 1))),
                preferred_element_type=jnp.float32,
            ).reshape(rows, heads, length, -1)
            if self.softcap is not None:
                scores = self.softcap * jnp.tanh(scores / self.softcap)
            mask = visible(
                *jax.tree.unflatten(treedef, marks), window=self.window, block=self.block
            )
            return jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)

        own, kv = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        marks, treedef = jax.tree.flatten((queries, keys))
        rows = (("batch", None),) * len(marks)
        out = ("batch", "heads", None, None)
        return kernel_map(run, (own, kv, *rows), out)(q, k.astype(q.dtype), *marks)

    def average(
        self, weights: Float[Array, "B N T S"], v: Float[Array, "B S G K"]
    ) -> Float[Array, "B T N K"]:
        """Every query's average of values, by weights from :meth:`probabilities`."""

        def run(weights, v):
            v = self._local_heads(jnp.swapaxes(weights, 1, 2), v)
            rows, heads, length, keys = weights.shape
            grouped = weights.astype(v.dtype).reshape(rows, v.shape[2], -1, keys)
            mixed = jax.lax.dot_general(
                grouped, jnp.swapaxes(v, 1, 2), (((3,), (2,)), ((0, 1), (0, 1)))
            )
            return jnp.swapaxes(mixed.reshape(rows, heads, length, -1), 1, 2)

        own, kv = ("batch", "heads", None, None), ("batch", None, "kv_heads", None)
        return kernel_map(run, (own, kv), ("batch", None, "heads", None))(weights, v)

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


def filled(
    length: Int[Array, "B"], slots: Int[Array, "B T"], written: Bool[Array, "B T"]
) -> Int[Array, "B"]:
    """How many slots of each row are filled once those of ``slots`` that are ``written`` are."""
    upto = jnp.max(jnp.where(written, slots + 1, 0), axis=1)
    return jnp.maximum(length, upto.astype(length.dtype))


def _places(count, length, segment_ids, x):
    """Each token's position among the tokens of its sequence, ``[B, count]`` int32."""
    if length is None and segment_ids is not None:
        return token_positions(segment_ids)
    offsets = jnp.arange(count, dtype=jnp.int32)
    if length is None:
        return jnp.broadcast_to(offsets, (x.shape[0], count))
    return length[:, None] + offsets


def _twice(x, views):
    """What is said of one view, of both."""
    if views == 1:
        return x
    x = constrain(x, "batch", None)  # Explicit axes: no concatenation along a sharded dimension.
    return constrain(jnp.concatenate([x, x], axis=1), "batch", "seq")


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
