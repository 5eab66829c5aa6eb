"""From published tensors to our parameters, every slice straight into the shard that it belongs to.

The host copies bytes in the order of the files, and holds one shard and one published tensor; the
device transposes and casts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import InputError
from .layouts import Layout
from .table import Leaf, Piece

Tree = dict[Any, Any]

# Arrays below this many bytes are transposed on the host: no program is compiled for them.
SMALL = 1 << 20


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
        return sum(x.nbytes for x in {piece.stored for piece in self._pieces()})

    def _pieces(self) -> Iterator[Piece]:
        """Of all leaves, and their copies."""
        for leaf in self.leaves:
            for piece in leaf.pieces:
                yield from piece.all

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
        files = {piece.stored.file.name for piece in self._pieces()}
        pieces = sum(1 for _ in self._pieces())
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
    sharding = abstract.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = sharding.addressable_devices_indices_map(leaf.shape)
    host: dict[tuple, np.ndarray] = {}
    shards = []
    for device, index in places.items():
        spans = [slice(*i.indices(size)[:2]) for i, size in zip(index, leaf.shape, strict=True)]
        key = tuple((s.start, s.stop) for s in spans)
        if key not in host:
            # Copies of one shard mostly follow one another; another shard's turn frees this one.
            host.clear()
            host[key] = _read(leaf, spans)
        shards.append(_placed(host[key], device, _order(leaf), abstract.dtype))
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _order(leaf: Leaf) -> tuple[int, ...]:
    """From the order in which ``_read`` has a leaf's dimensions to ours."""
    leading = len(leaf.pieces[0].at)
    return (*range(leading), *(leading + i for i in leaf.pieces[0].layout.order))


def _read(leaf: Leaf, spans: Sequence[slice]) -> np.ndarray:
    """Part of a leaf as its files have it: its dimensions in the order of the first piece's."""
    pieces = {piece.at: piece for piece in leaf.pieces}
    leading = len(leaf.pieces[0].at)
    layout = leaf.pieces[0].layout
    lead, own = spans[:leading], spans[leading:]
    shape = [s.stop - s.start for s in own]
    out = empty(
        [s.stop - s.start for s in lead] + [shape[i] for i in layout.published_order],
        widest(piece.stored.dtype for piece in leaf.pieces),
    )
    for at in itertools.product(*(range(s.start, s.stop) for s in lead)):
        piece = pieces[at]
        value = _value(piece, leaf, own, layout)
        for copy in piece.copies:
            # Of PyTorch's files, mostly one place under two names.
            if copy.stored != piece.stored:
                other = _value(copy, leaf, own, layout)
                if not np.array_equal(value, other, equal_nan=True):
                    raise InputError(
                        f"{piece.name} and {copy.name} are one tensor under two names, and differ "
                        f"in {piece.stored.file.parent}; leave out the one that is not meant"
                    )
        out[tuple(i - s.start for i, s in zip(at, lead, strict=True))] = value
    return out


def _value(piece: Piece, leaf: Leaf, own: Sequence[slice], layout: Layout) -> np.ndarray:
    """Part of a piece, its dimensions in the order of ``layout``."""
    value = piece.layout.read(piece.stored.read, leaf.own_shape, own)
    if piece.layout.order != layout.order:
        value = value.transpose(piece.layout.order).transpose(layout.published_order)
    return value


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """``np.empty``, aligned so that a CPU device takes the memory over instead of copying it."""
    nbytes = np.dtype(dtype).itemsize * math.prod(shape)
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _placed(
    x: np.ndarray, device: jax.Device, order: tuple[int, ...], dtype: np.dtype
) -> jax.Array:
    if order == tuple(range(x.ndim)) and x.dtype == dtype:
        return jax.device_put(x, device)
    if x.nbytes < SMALL:
        return jax.device_put(np.ascontiguousarray(x.transpose(order)).astype(dtype), device)
    # NumPy transposes a large matrix several times slower than it is read.
    return permuted(jax.device_put(x, device), order, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def permuted(x: jax.Array, order: tuple[int, ...], dtype: Any) -> jax.Array:
    """``x`` with its dimensions in another order, and cast, on the device where it lies."""
    return x.transpose(order).astype(dtype)


def _shard_shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def fill(tree: Mapping[Any, Any], found: Mapping[tuple[Any, ...], Any]) -> Tree:
    """``tree`` with the arrays of ``found`` (by path) in the places of its leaves."""

    def one(path, old):
        return found.get(tuple(getattr(k, "key", getattr(k, "idx", k)) for k in path), old)

    return jax.tree.map_with_path(one, dict(tree))
