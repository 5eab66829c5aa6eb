"""What decoding does to a model's cache without knowing the model.

Every leaf of a cache has a batch axis; a leaf that grows with ``max_length`` is addressed by
position, so that going back is a matter of the row's length; any other leaf is recurrent (a fast
weight, a convolution's inputs, the length itself) and must be kept to be returned to. Both are read
off the shapes of two caches, so a family declares nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..errors import InputError
from ..sharding import mesh_axes_of, take_rows

Cache = Any


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Which axis of every leaf is the batch, and which leaves are addressed by position.

    Attributes:
        batch: batch axis, leaf by leaf.
        position: axis that grows with ``max_length``; None for recurrent leaves.
    """

    batch: tuple[int, ...]
    position: tuple[int | None, ...]

    @classmethod
    def of(cls, model: Any, max_length: int) -> CacheLayout:
        """The layout of ``model.init_cache(batch, max_length)``; nothing is allocated.

        ``max_length`` is that of the cache in use: a window that it exceeds is a ring, which is
        recurrent.
        """
        mesh = jax.sharding.get_abstract_mesh()
        ways = 1
        for axis in mesh_axes_of("batch"):
            ways *= mesh.shape[axis]

        def shapes(batch, length):
            cache = jax.eval_shape(lambda: model.init_cache(batch * ways, length))
            return [leaf.shape for leaf in jax.tree.leaves(cache)]

        one = shapes(2, max_length)
        batch = [_grown(a, b) for a, b in zip(one, shapes(4, max_length), strict=True)]
        if None in batch:
            raise InputError(f"{type(model).__name__}'s cache has a leaf without a batch axis")
        position = [_grown(a, b) for a, b in zip(one, shapes(2, 2 * max_length), strict=True)]
        return cls(tuple(batch), tuple(position))

    @property
    def is_recurrent(self) -> bool:
        """Whether more than the length must be kept to go back."""
        return len(self.recurrent_batch) > 1

    @property
    def recurrent_batch(self) -> tuple[int, ...]:
        """The batch axis of every leaf of :meth:`recurrent`."""
        return tuple(a for a, p in zip(self.batch, self.position, strict=True) if p is None)

    def map(self, fn: Callable[..., Array], *caches: Cache) -> Cache:
        """``fn(leaf, ..., batch_axis)`` of every leaf."""
        leaves = [jax.tree.leaves(cache) for cache in caches]
        new = [fn(*x, axis) for *x, axis in zip(*leaves, self.batch, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(caches[0]), new)

    def take(self, cache: Cache, rows: Int[Array, "R"]) -> Cache:
        """The cache of these rows, in this order; a row may occur several times."""
        return self.map(lambda leaf, axis: take_rows(leaf, rows, axis), cache)

    def where(self, mask: Bool[Array, "B"], new: Cache, old: Cache) -> Cache:
        """``new``'s rows where ``mask``, ``old``'s elsewhere."""
        return self.map(lambda a, b, axis: jnp.where(along(mask, a, axis), a, b), new, old)

    def recurrent(self, cache: Cache) -> list[Array]:
        """The leaves to keep in order to return to this point."""
        leaves = jax.tree.leaves(cache)
        return [x for x, axis in zip(leaves, self.position, strict=True) if axis is None]

    def with_recurrent(self, cache: Cache, kept: Sequence[Array]) -> Cache:
        """``cache`` with the recurrent leaves that :meth:`recurrent` gave."""
        leaves, kept = jax.tree.leaves(cache), iter(kept)
        new = [
            next(kept) if axis is None else leaf
            for leaf, axis in zip(leaves, self.position, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(cache), new)

    def recurrent_where(self, mask: Bool[Array, "B"], new: Cache, old: Cache) -> Cache:
        """``new``, but with the recurrent leaves of ``old`` in rows outside ``mask``.

        For rows that read a token once more: what is addressed by position is written again with
        what it was, only recurrent state would move on.
        """
        kept = zip(self.recurrent(new), self.recurrent(old), self.recurrent_batch, strict=True)
        return self.with_recurrent(
            new, [jnp.where(along(mask, a, axis), a, b) for a, b, axis in kept]
        )


def along(mask: Bool[Array, "B"], leaf: Array, axis: int) -> Bool[Array, "..."]:
    """A row mask, shaped to broadcast against a leaf whose batch axis this is."""
    shape = [1] * leaf.ndim
    shape[axis] = mask.shape[0]
    return mask.reshape(shape)


def _grown(a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    """The axis in which shape ``b`` exceeds ``a``."""
    return next((i for i, (m, n) in enumerate(zip(a, b, strict=True)) if n > m), None)
