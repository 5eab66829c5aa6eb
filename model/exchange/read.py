"""From published tensors to our parameters, every slice straight into the shard that it belongs to.

Host memory holds the shard that is being filled and one published tensor, never a model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .table import Leaf, Piece

Tree = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Stands for an array in a tree of parameters until somebody calls ``load()``."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """What will be read, and where it goes; nothing of it is read yet.

    Attributes:
        leaves: our arrays and their pieces.
        abstract: each of them as a ``ShapeDtypeStruct`` (with a sharding, where one was asked for).
    """

    leaves: tuple[Leaf, ...]
    abstract: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves)

    @property
    def stored_bytes(self) -> int:
        """How many bytes of the files are read."""
        tensors = {p.name: p.stored.nbytes for leaf in self.leaves for p in leaf.pieces}
        return sum(tensors.values())

    @property
    def nbytes(self) -> int:
        """How many bytes the parameters take on all devices, each counted once."""
        return sum(x.dtype.itemsize * math.prod(x.shape) for x in self.abstract)

    @property
    def shard_bytes(self) -> list[int]:
        """Bytes of one device's part of each array; the largest is what the host must hold."""
        return [x.dtype.itemsize * math.prod(_shard_shape(x)) for x in self.abstract]

    def summary(self) -> str:
        """Sizes, in one line."""
        files = {piece.stored.file.name for leaf in self.leaves for piece in leaf.pieces}
        pieces = sum(len(leaf.pieces) for leaf in self.leaves)
        return (
            f"{self.num_params / 1e9:.3f}e9 parameters: {pieces} tensors of {len(files)} files "
            f"({self.stored_bytes / 1e9:.2f} GB) into {len(self.leaves)} arrays "
            f"({sum(self.shard_bytes) / 1e9:.2f} GB a device, the largest shard "
            f"{max(self.shard_bytes, default=0) / 1e9:.2f} GB)"
        )

    def load(self, progress: Callable[[int], None] | None = None) -> dict[tuple[Any, ...], Any]:
        """The arrays, by path.

        Args:
            progress: called with the number of parameters after each array.
        """
        out = {}
        for leaf, abstract in zip(self.leaves, self.abstract, strict=True):
            out[leaf.path] = read_leaf(leaf, abstract)
            if progress is not None:
                progress(math.prod(leaf.shape))
        return out

    def lazily(self) -> dict[tuple[Any, ...], Lazy]:
        """What stands for the arrays, by path; each is read when it is asked for."""
        return {
            leaf.path: Lazy(leaf.shape, x.dtype, functools.partial(read_leaf, leaf, x))
            for leaf, x in zip(self.leaves, self.abstract, strict=True)
        }


def plan(leaves: Sequence[Leaf], wanted: Mapping[Any, Any], *, stored_dtypes: bool) -> LoadPlan:
    """The plan that fills these leaves.

    Args:
        leaves: as :func:`.table.match` returns them.
        wanted: the tree of ``ShapeDtypeStruct`` that the leaves are in; its shardings say where
            arrays go, the default device where there is none.
        stored_dtypes: keep the files' dtypes (the widest, where one array has several) instead of
            those of ``wanted``.
    """
    abstract = []
    for leaf in leaves:
        x = wanted
        for key in leaf.path:
            x = x[key]
        dtype = x.dtype
        if stored_dtypes:
            dtype = widest(piece.stored.dtype for piece in leaf.pieces)
        place = getattr(x, "sharding", None)
        abstract.append(jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place))
    return LoadPlan(tuple(leaves), tuple(abstract))


def widest(dtypes) -> np.dtype:
    """The dtype that holds values of all of these; numbers above 32 bits are cut to 32."""
    dtypes = list(dict.fromkeys(dtypes))
    if len(dtypes) > 1:
        dtypes = [np.dtype(np.float32)]
    narrow = {np.dtype(np.float64): np.dtype(np.float32)}
    return narrow.get(dtypes[0], dtypes[0])


def read_leaf(leaf: Leaf, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """One of our arrays on its devices."""
    by_place: dict[tuple[int, ...], Piece] = {piece.at: piece for piece in leaf.pieces}
    seen: dict[tuple, np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        spans = [slice(*i.indices(size)[:2]) for i, size in zip(index, leaf.shape, strict=True)]
        key = tuple((s.start, s.stop) for s in spans)
        if key not in seen:
            # Copies of one shard follow one another; another shard's turn frees this one.
            seen.clear()
            seen[key] = _read(leaf, by_place, spans, abstract.dtype)
        return seen[key]

    if abstract.sharding is None:
        return jax.device_put(shard((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, abstract.sharding, shard)


def _read(
    leaf: Leaf, by_place: Mapping[tuple[int, ...], Piece], spans: Sequence[slice], dtype: np.dtype
) -> np.ndarray:
    out = np.empty([s.stop - s.start for s in spans], dtype)
    leading = len(leaf.pieces[0].at)
    starts = [s.start for s in spans[:leading]]
    for at in itertools.product(*(range(s.start, s.stop) for s in spans[:leading])):
        piece = by_place[at]
        target = out[tuple(i - start for i, start in zip(at, starts, strict=True))]
        target[...] = piece.layout.read(piece.stored.read, leaf.own_shape, spans[leading:])
    return out


def _shard_shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def fill(tree: Mapping[Any, Any], found: Mapping[tuple[Any, ...], Any]) -> Tree:
    """``tree`` with the arrays of ``found`` (by path) in the places of its leaves."""

    def one(path, old):
        return found.get(tuple(getattr(k, "key", getattr(k, "idx", k)) for k in path), old)

    return jax.tree.map_with_path(one, dict(tree))
