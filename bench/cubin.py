"""Takes the GPU kernels out of a program that XLA compiled, for a GPU that need not be here.

XLA compiles to machine code with the ptxas inside its CUDA plugin, and ``serialize()`` of a
compiled program holds the result. It is a Riegeli file (records in chunks, compressed by Snappy),
in later versions of jax a file inside another one; the kernels are ELF files somewhere in its
records. The launches, with grid, threads and shared memory, are in a text that XLA dumps: set
``XLA_FLAGS`` to :func:`arguments` before the first compilation.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import struct
from collections.abc import Iterator

_RIEGELI = bytes.fromhex("83af70d10d884a3f")
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_ELF = b"\x7fELF\x02"
_ATTRIBUTES = {0x2F: "registers", 0x11: "frame"}  # of .nv.info
_LAUNCH = re.compile(
    r"^\s*(\d+): .*?\](?: kCustomKernel \[[^]]*\])? (\S+) grid: \[([\d, ]+)\] "
    r"threads: \[([\d, ]+)\] +shared_memory: (\d+)",
    re.MULTILINE,
)
_NAME = re.compile(r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)')


def arguments(folder: str | pathlib.Path) -> str:
    """Options for ``XLA_FLAGS`` to write the launches into a folder."""
    return f"--xla_dump_to={folder}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Machine code: bytes of ELF, registers a thread, bytes of its stack and of shared memory."""

    name: str
    elf: bytes
    registers: int
    frame: int
    static_shared: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as a program runs it: programs (CTAs), threads of one, bytes of shared memory."""

    kernel: str
    instruction: str  # of the HLO program
    programs: int
    threads: int
    dynamic_shared: int


def launches(folder: str | pathlib.Path) -> list[Launch]:
    """What the one program whose dump is in the folder runs, in order."""
    texts = {}
    for name in ("thunk_sequence", "thunk_metadata"):
        files = list(pathlib.Path(folder).glob(f"*.{name}.txt"))
        if len(files) != 1:
            raise ValueError(f"{len(files)} dumps of a {name} in {folder}, not of one program")
        texts[name] = files[0].read_text(encoding="utf-8")
    names = {int(number): name for name, number in _NAME.findall(texts["thunk_metadata"])}
    return [
        Launch(
            kernel,
            names.get(int(number), kernel),
            math.prod(map(int, grid.split(","))),
            math.prod(map(int, threads.split(","))),
            int(shared),
        )
        for number, kernel, grid, threads, shared in _LAUNCH.findall(texts["thunk_sequence"])
    ]


def kernels(executable: bytes) -> dict[str, Kernel]:
    """The kernels of a serialized program by name."""
    found = {}
    for record in _all_records(executable):
        start = record.find(_ELF)
        while start >= 0:
            elf = record[start : start + _elf_size(record, start)]
            for kernel in read_elf(elf):
                found[kernel.name] = kernel
            start = record.find(_ELF, start + len(elf))
    return found


# Riegeli and Snappy -----------------------------------------------------------------------------


def _all_records(data: bytes) -> Iterator[bytes]:
    start = data.find(_RIEGELI)
    if start < 0:
        raise ValueError("no Riegeli file: another version of jax, or no program for a GPU")
    for record in _records(data[start:]):
        if record.startswith(_RIEGELI):
            yield from _all_records(record)
        else:
            yield record


def _records(file: bytes) -> Iterator[bytes]:
    """Of a file without transposed chunks. Headers of 64 KiB blocks lie in the midst of chunks."""
    data = b"".join(file[at + _BLOCK_HEADER : at + _BLOCK] for at in range(0, len(file), _BLOCK))
    at = 0
    while at + _CHUNK_HEADER <= len(data):
        size, kind = struct.unpack_from("<8xQ8xB", data, at)
        chunk = data[at + _CHUNK_HEADER : at + _CHUNK_HEADER + size]
        at += _CHUNK_HEADER + size
        if kind != ord("r"):
            continue
        length, start = _varint(chunk, 1)
        sizes, values = chunk[start : start + length], chunk[start + length :]
        if chunk[0] == ord("s"):
            sizes, values = (snappy(x[_varint(x, 0)[1] :]) for x in (sizes, values))
        elif chunk[0]:
            raise ValueError(f"a chunk compressed by {chr(chunk[0])!r}, and not by Snappy")
        i = first = 0
        while i < len(sizes):
            length, i = _varint(sizes, i)
            yield values[first : first + length]
            first += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def snappy(data: bytes) -> bytes:
    """Decompresses."""
    size, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            length = tag >> 2
            if length >= 60:
                extra = length - 59
                length = int.from_bytes(data[at : at + extra], "little")
                at += extra
            out += data[at : at + length + 1]
            at += length + 1
            continue
        if tag & 3 == 1:
            length, back = 4 + (tag >> 2 & 7), tag >> 5 << 8 | data[at]
            at += 1
        else:
            extra = 2 if tag & 3 == 2 else 4
            length, back = 1 + (tag >> 2), int.from_bytes(data[at : at + extra], "little")
            at += extra
        for _ in range(length):  # what is copied may be what it makes
            out.append(out[-back])
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes of {size}")
    return bytes(out)


# ELF --------------------------------------------------------------------------------------------


def _headers(data: bytes, start: int) -> tuple[int, int, int, int, int, int, int]:
    """Where program and section headers are, size and count of each, index of the names."""
    programs, sections = struct.unpack_from("<QQ", data, start + 0x20)
    return programs, sections, *struct.unpack_from("<5H", data, start + 0x36)


def _elf_size(data: bytes, start: int) -> int:
    """Its headers come last."""
    programs, sections, size, count, each, number, _ = _headers(data, start)
    return max(programs + size * count, sections + each * number)


def read_elf(elf: bytes) -> Iterator[Kernel]:
    """The kernels of an ELF file."""
    _, table, _, _, each, count, names = _headers(elf, 0)
    headers = [struct.unpack_from("<II16xQQ", elf, table + each * i) for i in range(count)]
    start = headers[names][2]

    def text(at):
        return elf[at : elf.index(b"\0", at)].decode()

    sections = {text(start + name): (offset, size) for name, _, offset, size in headers}
    offset, size = sections.get(".symtab", (0, 0))
    base = sections[".strtab"][0]
    symbols = [
        text(base + struct.unpack_from("<I", elf, at)[0]) for at in range(offset, offset + size, 24)
    ]
    found: dict[str, dict[str, int]] = {}
    at, size = sections.get(".nv.info", (0, 0))
    end = at + size
    while at < end:
        form, attribute, length = struct.unpack_from("<BBH", elf, at)
        at += 4
        if form != 4:  # the value is in the place of the length
            continue
        if attribute in _ATTRIBUTES:
            symbol, value = struct.unpack_from("<II", elf, at)
            found.setdefault(symbols[symbol], {})[_ATTRIBUTES[attribute]] = value
        at += length
    for name, facts in found.items():
        if f".text.{name}" in sections:
            shared = sections.get(f".nv.shared.{name}", (0, 0))[1]
            yield Kernel(name, elf, facts.get("registers", 0), facts.get("frame", 0), shared)
