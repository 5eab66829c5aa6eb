"""Tensors in files, a slice at a time; safetensors, read and written as a stream.

Reading maps one tensor at a time and copies the slice that is asked for; writing holds one tensor.
So neither needs memory for a shard, let alone for a model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from ...errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
DTYPES = {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The library's own limit: a larger header is no header.
_MAX_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one published tensor lies.

    Attributes:
        file: the file.
        dtype: its dtype there.
        shape: its shape there.
        start: first byte, counted from the beginning of the file.
        strides: elements from one entry of each dimension to the next; None where the last
            dimension is the innermost one and nothing lies between.
    """

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The values at ``index`` (a slice of each dimension), or all of them.

        Of a local file they are mapped, and read from it when they are copied to their place; let
        go of them then.
        """
        whole = (slice(None),) * len(self.shape)
        spans = [range(n)[s] for n, s in zip(self.shape, index or whole, strict=True)]
        shape = tuple(map(len, spans))
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        strides = self.strides
        if strides is None:
            strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        size = self.dtype.itemsize
        # One range of bytes has them all, from the first value to the last.
        first = sum(span.start * step for span, step in zip(spans, strides, strict=True))
        last = sum(span[-1] * step for span, step in zip(spans, strides, strict=True))
        start, count = self.start + first * size, (last - first + 1) * size
        if "://" not in str(self.file):
            raw = np.memmap(self.file, np.uint8, "r", start, (count,))
        else:
            with self.file.open("rb") as file:
                file.seek(start)
                raw = file.read(count)
        steps = [step * span.step * size for span, step in zip(spans, strides, strict=True)]
        return np.ndarray(shape, self.dtype, raw, strides=steps)


def read_header(file: epath.Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name.

    Raises:
        InputError: it is no safetensors file, ends early, or has a dtype that nothing here reads.
    """
    size = file.stat().length
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise InputError(f"{file} is no safetensors file, or was cut short; fetch it again")
        try:
            header = json.loads(opened.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in entries.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} has a damaged safetensors header ({error}); fetch it again"
            ) from error
    end = 8 + length + max(ends, default=0)
    if size < end:
        raise InputError(
            f"{file} has {size} bytes, and its header speaks of {end}: it was cut short; fetch it "
            "again"
        )
    found = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{file}: tensor {name} has dtype {entry['dtype']}, which is not read here; known "
                f"are {', '.join(DTYPES)}"
            )
        start, stop = entry["data_offsets"]
        stored = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start)
        if stored.nbytes != stop - start:
            raise InputError(
                f"{file}: tensor {name} of shape {stored.shape} and dtype {entry['dtype']} needs "
                f"{stored.nbytes} bytes, and its header gives it {stop - start}; fetch it again"
            )
        found[name] = stored
    return found


def encode_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file that holds these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [at, at + nbytes],
        }
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def dtype_name(dtype: Any) -> str:
    """The name that safetensors give a dtype.

    Raises:
        InputError: they have none.
    """
    try:
        return _NAMES[np.dtype(dtype)]
    except KeyError:
        raise InputError(
            f"dtype={np.dtype(dtype)} has no name in safetensors; use one of "
            f"{', '.join(str(d) for d in _NAMES)}"
        ) from None


def write_file(file: epath.Path, header: bytes, tensors: Iterable[np.ndarray]) -> None:
    """Write a safetensors file, one tensor after another; ``tensors`` are as ``header`` says."""
    with file.open("wb") as opened:
        opened.write(header)
        for tensor in tensors:
            opened.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            del tensor  # It may be a view, and keep its array while the next one is read.
