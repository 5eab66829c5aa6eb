"""PyTorch's checkpoints (``.bin``, ``.pt``) on disk, read without PyTorch and without running them.

Such a file is a zip whose members are a pickle, which says what the tensors are, and the bytes of
each storage. A pickle is a program: Python's own reader would run it. Here an interpreter knows
the two dozen instructions that make dictionaries, tuples and tensors, and nothing to call; all
else is refused. The bytes are read as those of safetensors are, a slice at a time. Written down
after the files that ``torch.save`` makes (protocols 2 to 5, since PyTorch 1.6).
"""

from __future__ import annotations

import dataclasses
import pickletools
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from etils import epath

from ...errors import InputError
from .files import DTYPES, Stored

_STORAGES = {
    "torch.BFloat16Storage": "BF16",
    "torch.BoolStorage": "BOOL",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.ShortStorage": "I16",
}
# A storage of bytes, whose tensors name their dtype: those that came too late for one of their own.
_UNTYPED = "torch.storage.UntypedStorage"
_SCALARS = {
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
}
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TYPED_TENSOR = "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_KNOWN = {_DICT, _TENSOR, _TYPED_TENSOR, _PARAMETER, _UNTYPED, *_STORAGES, *_SCALARS}

# What Python's zipfile raises of damage.
_UNREADABLE = (zipfile.BadZipFile, EOFError, RuntimeError, struct.error, zlib.error)

_RESAVE = (
    "load it with torch, where you trust it, and save the tensors alone: "
    "torch.save(model.state_dict(), ...), or save_pretrained(safe_serialization=True)"
)


def read_torch_header(file: epath.Path) -> dict[str, Stored]:
    """The tensors of one file that ``torch.save`` wrote of a state dict, by name.

    Tensors that share a storage, transposed ones and other views are read as they are.

    Raises:
        InputError: it is no such file, ends early, was written on a big-endian machine, holds
            anything but tensors by name, or asks for anything else to be made or called.
    """
    size = file.stat().length
    with file.open("rb") as opened:
        beginning = opened.read(8)
        opened.seek(0)
        try:
            with zipfile.ZipFile(opened) as archive:
                members = {info.filename: info for info in archive.infolist()}
                root = _root(file, members)
                order = b"little"
                if f"{root}byteorder" in members:
                    order = archive.read(f"{root}byteorder").strip()
                if order != b"little":
                    raise InputError(
                        f"{file} has byteorder={order.decode(errors='replace')!r}: its numbers "
                        f"were written by a big-endian machine, which is not read; there, {_RESAVE}"
                    )
                program = archive.read(f"{root}data.pkl")
        except _UNREADABLE as error:
            raise InputError(_no_archive(file, beginning, error)) from error
        found = {}
        places: dict[str, tuple[int, int]] = {}
        for name, tensor in _Interpreter(file).run(program).items():
            key = f"{root}data/{tensor.storage.key}"
            if key not in places:
                places[key] = _place(file, opened, size, key, members.get(key))
            found[name] = tensor.stored(file, name, *places[key])
    return found


def _root(file: epath.Path, members: dict[str, zipfile.ZipInfo]) -> str:
    """The folder in the archive that everything is in."""
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(
            f"{file} is a zip without one data.pkl: torch.save did not write it; give the file "
            "that it did"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise InputError(f"{file} is a TorchScript program, which is not run here; {_RESAVE}")
    packed = [n for n, info in members.items() if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise InputError(
            f"{file}: {packed[0]} is compressed, which torch.save never does; {_RESAVE}"
        )
    return root


def _place(
    file: epath.Path, opened: Any, size: int, key: str, info: zipfile.ZipInfo | None
) -> tuple[int, int]:
    """First byte and number of bytes of a member."""
    if info is None:
        raise InputError(f"{file} has no member {key}, which its tensors lie in; fetch it again")
    # The directory at the end does not say how long a member's own header is.
    opened.seek(info.header_offset)
    header = opened.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise InputError(f"{file} is damaged where {key} should begin; fetch it again")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + info.file_size > size:
        raise InputError(
            f"{file} has {size} bytes, and {key} ends at {start + info.file_size}: it was cut "
            "short; fetch it again"
        )
    return start, info.file_size


def _no_archive(file: epath.Path, beginning: bytes, error: Exception) -> str:
    if beginning.startswith(b"PK\x03\x04"):
        return f"{file} was cut short, or is damaged ({error}); fetch it again"
    if beginning[:1] == b"\x80":
        return (
            f"{file} is a bare pickle, as PyTorch wrote before version 1.6; only its zip files are "
            f"read: {_RESAVE}"
        )
    return f"{file} is no PyTorch checkpoint; fetch it again"


# ------------------------------------------------------------------------------------- the program


@dataclasses.dataclass(frozen=True)
class _Named:
    """What a pickle names; standing for it, never it."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A member of the archive, as the pickle speaks of it."""

    dtype: np.dtype | None
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; counts are of elements."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def stored(self, file: epath.Path, name: str, start: int, nbytes: int) -> Stored:
        """Where it lies, given the first byte of its storage, and how many that has."""
        counts = (self.offset, *self.shape, *self.strides)
        sizes = all(type(n) is int and 0 <= n < 1 << 63 for n in counts)
        if not sizes or len(self.shape) != len(self.strides):
            raise InputError(
                f"{file}: tensor {name} has an offset, a shape or strides that are no tensor's; "
                "fetch it again"
            )
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        end = 0 if 0 in self.shape else (self.offset + reach + 1) * self.dtype.itemsize
        if end > nbytes:
            raise InputError(
                f"{file}: tensor {name} of shape {self.shape} and dtype {self.dtype} ends at byte "
                f"{end} of its storage, which has {nbytes}; fetch it again"
            )
        at = start + self.offset * self.dtype.itemsize
        return Stored(file, self.dtype, self.shape, at, self.strides)


class _Malformed(Exception):
    """A pickle that no Python wrote."""


class _Interpreter:
    """Runs what of a pickle's instructions a dictionary of tensors needs."""

    def __init__(self, file: epath.Path):
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> dict[str, Any]:
        """The tensors by name.

        Raises:
            InputError: the program is damaged, makes something else, or names something else.
        """
        try:
            for code, argument, _ in pickletools.genops(program):
                if code.name == "STOP":
                    return self._named(self.stack.pop())
                self._step(code.name, argument)
        except InputError:
            raise
        except (_Malformed, LookupError, ValueError, TypeError, struct.error) as error:
            raise InputError(
                f"{self.file} has a damaged data.pkl ({error}); fetch it again"
            ) from error
        raise InputError(f"{self.file} has a data.pkl without an end; fetch it again")

    def _named(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise InputError(f"{self.file} holds a {_kind(value)}, not tensors by name; {_RESAVE}")
        for name, tensor in value.items():
            if not isinstance(tensor, _Tensor):
                raise InputError(
                    f"{self.file}: entry {name!r} has the type {_kind(tensor)}, so this is "
                    f"no model's state dict; {_RESAVE}"
                )
        return value

    def _step(self, code: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match code:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(code == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                push(argument)
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "TUPLE":
                push(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(code[-1])
                values = [pop() for _ in range(count)]
                push(tuple(reversed(values)))
            case "APPEND":
                value = pop()
                self._top(list).append(value)
            case "APPENDS":
                values = self._since_mark()
                self._top(list).extend(values)
            case "SETITEM":
                value, key = pop(), pop()
                self._set(key, value)
            case "SETITEMS":
                values = self._since_mark()
                for key, value in zip(values[::2], values[1::2], strict=True):
                    self._set(key, value)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(self._known(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(self._known(f"{module}.{name}"))
            case "BINPERSID":
                push(self._storage(pop()))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(self._made(function, arguments))
            case "BUILD":
                # Attributes of a state dict: the versions of its modules.
                pop()
                self._top(dict)
            case _:
                raise InputError(
                    f"{self.file} has the instruction {code}, which tensors by name do not need; "
                    f"only weights are read of a pickle, and the file is refused: {_RESAVE}"
                )

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise _Malformed(f"a {kind.__name__} is filled that is a {_kind(self.stack[-1])}")
        return self.stack[-1]

    def _set(self, key: Any, value: Any) -> None:
        # No tuples: of one that is in itself a thousand times over, a hash takes for ever.
        if not isinstance(key, str | int):
            raise _Malformed(f"a {_kind(key)} is no name")
        self._top(dict)[key] = value

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _known(self, name: str) -> _Named:
        if name not in _KNOWN:
            raise InputError(
                f"{self.file} asks for {name}; only weights are read of a pickle, nothing in it is "
                f"run, and the file is refused: {_RESAVE}"
            )
        return _Named(name)

    def _storage(self, description: Any) -> _Storage:
        kind, of, key, _, size = description
        known = isinstance(of, _Named) and (of.name == _UNTYPED or of.name in _STORAGES)
        if kind != "storage" or not known or type(size) is not int or not isinstance(key, str):
            raise _Malformed("a storage is described as none is")
        dtype = None if of.name == _UNTYPED else DTYPES[_STORAGES[of.name]]
        return _Storage(dtype, key, size)

    def _made(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Named(name), () if name == _DICT:
                return {}
            case _Named(name), (_Tensor() as tensor, *_) if name == _PARAMETER:
                return tensor
            case _Named(name), (
                _Storage() as storage,
                offset,
                tuple(shape),
                tuple(strides),
                *_,
            ) if name == _TENSOR and storage.dtype is not None:
                return _Tensor(storage, storage.dtype, offset, shape, strides)
            case _Named(name), (
                _Storage() as storage,
                offset,
                tuple(shape),
                tuple(strides),
                _,
                _,
                _Named(scalar),
                *_,
            ) if name == _TYPED_TENSOR and scalar in _SCALARS:
                return _Tensor(storage, DTYPES[_SCALARS[scalar]], offset, shape, strides)
        raise _Malformed(f"a {_kind(function)} is called as torch.save calls none")


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, _Tensor) else type(value).__name__.lstrip("_").lower()
