"""From our parameters to published tensors: files as transformers writes and reads them.

A directory appears under its name only when all of it is there; until then it is called
``<name>.partial``, whose complete files a repeated call takes over (see :mod:`..unfinished`).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ...errors import InputError
from .files import INDEX, SINGLE, encode_header, read_header, write_file
from .read import SMALL, Lazy
from .table import Form, Leaf, Piece

PARTIAL = ".partial"


class Sources:
    """The parts of published tensors, found among our parameters.

    Args:
        leaves: as :func:`.table.layout_of_model` returns them.
        get: our array at a leaf's path; called when one of its tensors is written.
        abstract: shape and dtype of each leaf, in their order.
        dtype: of all tensors; each array's own if None.
        read_as: forms in which tensors were read; they are written in the same one.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        get: Callable[[tuple[Any, ...]], Any],
        abstract: Sequence[Any],
        *,
        dtype: np.dtype | None = None,
        read_as: Mapping[str, Form] | None = None,
    ):
        self._get = get
        self._held: dict[tuple[Any, ...], Any] = {}
        self._parts: dict[str, list[tuple[Leaf, Piece]]] = {}
        self.tensors: dict[str, Form] = {}
        for leaf, x in zip(leaves, abstract, strict=True):
            for piece in itertools.chain.from_iterable(piece.all for piece in leaf.pieces):
                form = np.dtype(x.dtype), piece.layout.published_shape(leaf.own_shape)
                before, shape = (read_as or {}).get(piece.name, form)
                self._parts.setdefault(piece.name, []).append((leaf, piece))
                self.tensors[piece.name] = dtype or before, shape

    def tensor(self, name: str) -> np.ndarray:
        """A published tensor on the host."""
        dtype, shape = self.tensors[name]
        self._hold([leaf.path for leaf, _ in self._parts[name]])
        parts = [
            (leaf, piece, take(self._held[leaf.path], piece.at, piece.layout.published_order))
            for leaf, piece in self._parts[name]
        ]
        leaf, piece, value = parts[0]
        if value.dtype == dtype and value.size == math.prod(shape):
            return value.reshape(shape)
        target = np.zeros(shape, dtype)
        for leaf, piece, value in parts:
            piece.layout.write(target, value, leaf.own_shape)
        return target

    def _hold(self, paths: Sequence[tuple[Any, ...]]) -> None:
        """Hold these arrays and no others.

        Tensors follow one another as arrays do, so each array is read once; those of the tensor
        before are let go of before the next are read, as one of them may be a third of the model.
        """
        self._held = {path: x for path, x in self._held.items() if path in paths}
        for path in paths:
            if path not in self._held:
                self._held[path] = _loaded(self._get(path))


def _loaded(x: Any) -> Any:
    return x.load() if isinstance(x, Lazy) else x


def take(x: Any, at: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """``x[at].transpose(order)`` on the host; no more of an array leaves its devices."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)[at].transpose(order)
    lead = len(at)
    if len(x.sharding.device_set) == 1:
        return _entry(x, at, order)
    out = np.empty([x.shape[lead + i] for i in order], x.dtype)
    for shard in x.addressable_shards:
        spans = [slice(*i.indices(n)[:2]) for i, n in zip(shard.index, x.shape, strict=True)]
        inside = all(s.start <= i < s.stop for i, s in zip(at, spans[:lead], strict=True))
        if shard.replica_id == 0 and inside:
            local = tuple(i - s.start for i, s in zip(at, spans[:lead], strict=True))
            out[tuple(spans[lead + i] for i in order)] = _entry(shard.data, local, order)
    return out


def _entry(x: jax.Array, at: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """``x[at].transpose(order)`` of an array on one device."""
    if x.device.platform == "cpu" and (x.nbytes < SMALL or order == tuple(sorted(order))):
        return np.asarray(x)[at].transpose(order)
    # A traced index: one program serves all layers and experts.
    return np.asarray(_index_and_permute(x, np.asarray(at, np.int32), order))


@functools.partial(jax.jit, static_argnums=2)
def _index_and_permute(x: jax.Array, at: jax.Array, order: tuple[int, ...]) -> jax.Array:
    for i in range(at.shape[0]):
        x = jax.lax.dynamic_index_in_dim(x, at[i], keepdims=False)
    return x.transpose(order)


def shards(tensors: Mapping[str, Form], shard_size: int) -> list[list[str]]:
    """Which tensors share a file: in order, as many as ``shard_size`` bytes hold, at least one."""
    out: list[list[str]] = [[]]
    room = shard_size
    for name, (dtype, shape) in tensors.items():
        nbytes = dtype.itemsize * math.prod(shape)
        if out[-1] and nbytes > room:
            out.append([])
            room = shard_size
        out[-1].append(name)
        room -= nbytes
    return out


def write_weights(
    directory: epath.Path,
    sources: Sources,
    *,
    shard_size: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the safetensors of a model, and their index where there are several.

    A file that is complete already, with the same header, is left as it is.

    Args:
        directory: exists, and holds no weights but of the same source.
        sources: of the tensors.
        shard_size: bytes a file, at most (but for a larger tensor).
        progress: called with the number of bytes after each tensor.
    """
    files = shards(sources.tensors, shard_size)
    names = [SINGLE]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    sizes = {n: d.itemsize * math.prod(s) for n, (d, s) in sources.tensors.items()}

    def stream(tensors: Sequence[str]) -> Iterator[np.ndarray]:
        for name in tensors:
            yield sources.tensor(name)
            if progress is not None:
                progress(sizes[name])

    for name, tensors in zip(names, files, strict=True):
        header = encode_header({tensor: sources.tensors[tensor] for tensor in tensors})
        if _is_complete(directory / name, header):
            if progress is not None:
                progress(sum(sizes[tensor] for tensor in tensors))
            continue
        # Renamed when whole: a file under its own name is never a part of one.
        unfinished = directory / (name + PARTIAL)
        write_file(unfinished, header, stream(tensors))
        unfinished.replace(directory / name)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {t: n for n, group in zip(names, files, strict=True) for t in group},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _is_complete(file: epath.Path, header: bytes) -> bool:
    if not file.exists():
        return False
    with file.open("rb") as opened:
        if opened.read(len(header)) != header:
            return False
    try:
        read_header(file)
    except InputError:
        return False
    return True


def json_text(value: Any) -> str:
    """JSON as published files have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
