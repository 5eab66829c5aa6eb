"""Going back: a row's cache as it was at an earlier slot, whatever the model remembers by.

A *slot* counts committed tokens after the prompt; at slot ``s`` the cache has read all tokens but
the last, ``prompt_length + s - 1`` of them. What is addressed by position goes back by its length.
A recurrent state is kept at every multiple of a stride: the snapshot before the slot is restored,
and the few tokens since are read again, in one call. Callers never ask which a model needs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from .cache import CacheLayout, along
from .loop import DecodeState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Snapshots:
    """The recurrent leaves at slots ``0, stride, 2 stride, ...``.

    Attributes:
        leaves: each ``[count, ...]``; empty for a model that goes back by length alone.
        stride: slots between two snapshots.
    """

    leaves: list[Array]
    stride: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def begin(cls, layout: CacheLayout, cache: Any, slots: int, stride: int) -> Snapshots:
        """Room for ``slots`` slots; the state now is that of slot 0."""
        if not layout.is_recurrent:
            return cls([], stride)
        count = -(-slots // stride)
        kept = layout.recurrent(cache)
        return cls([jnp.broadcast_to(x, (count, *x.shape)) for x in kept], stride)

    def write(
        self, layout: CacheLayout, index: Int[Array, ""], mask: Bool[Array, "B"], cache: Any
    ) -> Snapshots:
        """Keep the state of the rows in ``mask`` as snapshot ``index``; one too many is dropped."""
        if not self.leaves:
            return self
        inside = jnp.clip(index, 0, self.leaves[0].shape[0] - 1)
        mask = mask & (inside == index)
        leaves = []
        for old, new, axis in zip(
            self.leaves, layout.recurrent(cache), layout.recurrent_batch, strict=True
        ):
            row = jax.lax.dynamic_index_in_dim(old, inside, keepdims=False)
            row = jnp.where(along(mask, new, axis), new, row)
            leaves.append(jax.lax.dynamic_update_index_in_dim(old, row, inside, 0))
        return dataclasses.replace(self, leaves=leaves)

    def where(self, layout: CacheLayout, mask: Bool[Array, "B"], other: Snapshots) -> Snapshots:
        """These rows where ``mask``, ``other``'s elsewhere."""
        pairs = zip(self.leaves, other.leaves, layout.recurrent_batch, strict=bool(self.leaves))
        leaves = [jnp.where(along(mask, a, axis + 1), a, b) for a, b, axis in pairs]
        return dataclasses.replace(self, leaves=leaves)

    def restore(
        self, layout: CacheLayout, index: Int[Array, "B"], mask: Bool[Array, "B"], cache: Any
    ) -> Any:
        """``cache``, in which the rows in ``mask`` have the state of their snapshot ``index``."""
        kept = []
        for old, now, axis in zip(
            self.leaves, layout.recurrent(cache), layout.recurrent_batch, strict=True
        ):
            # A row's own snapshot: few of them, so one is picked by looking at each in turn.
            def look(i, best, old=old, axis=axis):
                wanted = along(mask & (index == i), best, axis)
                one = jax.lax.dynamic_index_in_dim(old, i, keepdims=False)
                return jnp.where(wanted, one, best)

            first = jnp.min(jnp.where(mask, index, old.shape[0]))
            last = jnp.max(jnp.where(mask, index, -1))
            kept.append(jax.lax.fori_loop(first, last + 1, look, now))
        return layout.with_recurrent(cache, kept)


def rewind(
    model: nnx.Module,
    layout: CacheLayout,
    snapshots: Snapshots,
    state: DecodeState,
    slot: Int[Array, "B"],
    rows: Bool[Array, "B"],
    *,
    on_grid: bool = False,
) -> Any:
    """The cache with each of ``rows`` at its ``slot``, at most its own; other rows are as they are.

    Args:
        model: the merged module.
        layout: of its cache.
        snapshots: of this state; those up to ``slot`` are read.
        state: whose tokens, prompt lengths and cache these are.
        slot: to go back to.
        rows: that go back.
        on_grid: every slot is a multiple of the stride, so that nothing is read again.
    """
    if not layout.is_recurrent:
        return _shorter(state, slot, rows)
    index = slot // snapshots.stride
    cache = snapshots.restore(layout, index, rows, state.cache)
    if on_grid:
        return cache
    return read_piece(model, snapshots.stride, state, cache, index, slot, rows)


def reread(
    model: nnx.Module,
    layout: CacheLayout,
    snapshots: Snapshots,
    state: DecodeState,
    slot: Int[Array, "B"],
    rows: Bool[Array, "B"],
) -> tuple[Any, Snapshots]:
    """The cache and snapshots of ``rows`` made again from the tokens after ``slot``.

    For a state whose cache was written over from ``slot`` on. What comes before is intact.
    """
    stride = snapshots.stride
    index = slot // stride
    own = state.length - state.prompt_length
    if layout.is_recurrent:
        cache = snapshots.restore(layout, index, rows, state.cache)
    else:
        cache = _shorter(state, index * stride, rows)
    first = jnp.min(jnp.where(rows, index, state.tokens.shape[1]))
    last = jnp.max(jnp.where(rows, -(-own // stride), 0))

    def piece(i, carry):
        cache, snapshots = carry
        reached = rows & (index <= i)
        at = jnp.broadcast_to(i, own.shape)
        cache = read_piece(model, stride, state, cache, at, own, reached)
        passed = reached & ((i + 1) * stride <= own)
        return cache, snapshots.write(layout, i + 1, passed, cache)

    return jax.lax.fori_loop(first, last, piece, (cache, snapshots))


def read_piece(
    model: nnx.Module,
    stride: int,
    state: DecodeState,
    cache: Any,
    index: Int[Array, "B"],
    slot: Int[Array, "B"],
    rows: Bool[Array, "B"],
) -> Any:
    """From slot ``index * stride`` on, read up to ``stride`` tokens, so far as to ``slot``."""
    start = state.prompt_length + index * stride - 1
    places = start[:, None] + jnp.arange(stride)
    unread = rows[:, None] & (places < (state.prompt_length + slot - 1)[:, None])
    places = jnp.minimum(places, state.tokens.shape[1] - 1)
    tokens = jnp.take_along_axis(state.tokens, places, axis=1)
    return model(jnp.where(unread, tokens, 0), cache, segment_ids=unread.astype(jnp.int32))[1]


def _shorter(state: DecodeState, slot: Int[Array, "B"], rows: Bool[Array, "B"]) -> Any:
    """The cache, of which ``rows`` have read as much as at ``slot``."""
    length = jnp.where(rows, state.prompt_length + slot - 1, state.cache.length)
    return dataclasses.replace(state.cache, length=length.astype(jnp.int32))
