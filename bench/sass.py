"""Reads the machine code (SASS) of a GPU kernel: what it issues, and how long one warp takes alone.

``nvdisasm -c -hex`` writes the instructions with their encoding; in Hopper's and its relatives', 21
bits of each tell the warp's scheduler how many cycles to wait before the next instruction, which of
six barriers the instruction signs and which it waits for. :func:`read` gives a :class:`Code`, whose
:class:`Totals` count each instruction as often as the loops around it turn. How often that is, and
which share of the programs runs what a branch may skip, is not read but given: a number for each of
:attr:`Code.regions`.

Totals are of one warp: instructions, and cycles that each unit needs for them if nothing else held
it up. What no reading tells is the time of a memory access; :func:`alone` therefore takes assumed
latencies, those of :data:`LATENCY`, and runs the code in order, as the hardware does for one warp.

Predicates are taken as true, banks of shared memory as free of conflicts.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import subprocess
from collections.abc import Iterator, Sequence

WARP = 32
# Cycles that a scheduler's quarter of a multiprocessor needs for an instruction of a warp, by pipe:
# 32 threads over results a clock and multiprocessor / 4 (CUDA programming guide, arithmetic
# throughput, compute capability 9.0: 128, 64, 64 and 16). Conversions by F2F and its like are
# taken to be the special unit's, as they too sign barriers.
PIPES = {
    "fma": (1, "FADD FMUL FFMA HFMA2 HADD2 HMUL2"),
    "imad": (2, "IMAD"),
    "alu": (
        2,
        "LOP3 IADD3 VIADD SHF ISETP FSETP SEL FSEL PRMT MOV LEA FMNMX IMNMX VIMNMX F2FP PLOP3 "
        "IABS BMSK SGXT P2R R2P LOP I2FP CS2R",
    ),
    "xu": (8, "MUFU F2F F2I I2F POPC FLO BREV FRND"),
}
_PIPE = {name: (pipe, cycles) for pipe, (cycles, names) in PIPES.items() for name in names.split()}
# Multiply-adds a clock of a multiprocessor's four tensor cores (H100: 989 TFLOP/s in bfloat16, 132
# multiprocessors, 1.83 GHz), and the share of that for HMMA, the path before Hopper's: by published
# microbenchmarks it reaches half to two thirds.
TENSOR = {"F16": 2048, "BF16": 2048, "TF32": 1024, "E4M3": 4096, "E5M2": 4096}
LEGACY = 0.5
L1_BYTES = 128  # a clock and multiprocessor, of shared memory and of L1, which are one
# Cycles until a result is there: assumed, of the size that microbenchmarks of H100 find.
LATENCY = {
    "LDS": 30, "LDSM": 33, "SHFL": 24, "LDG": 600, "LDGSTS": 600, "LDL": 40, "LDC": 30,
    "MUFU": 24, "F2F": 24, "I2F": 24, "F2I": 24, "S2R": 25, "S2UR": 25, "R2UR": 12, "BAR": 20,
    "HGMMA": 32, "HMMA": 33,
}  # fmt: skip
_OTHER_LATENCY, _READ = 20, 12  # of what else signs a barrier; until sources are read
_LEAST_HGMMA = 16  # cycles of the pipe, however narrow
# A branch over fewer instructions is not worth a number.
LEAST_SKIP = 64

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/"
)
_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_HMMA = re.compile(r"HMMA\.(16)(8)(4|8|16)\.")
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)\.")
_MATRICES = re.compile(r"\.M[T]?\d+(?:\.([24]))?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line; `stall`, `signs`, `reads` (barriers, None for none) and `waits` are its control."""

    address: int
    predicate: str | None
    opcode: str
    operands: str
    stall: int
    signs: int | None
    reads: int | None
    waits: tuple[int, ...]

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Region:
    """Instructions that run as often as a loop turns, or that a branch may skip."""

    first: int
    last: int
    loop: bool

    def inside(self, other: Region) -> bool:
        """Whether it is a part of the other, or the same."""
        return other.first <= self.first and self.last <= other.last


@dataclasses.dataclass(frozen=True)
class Totals:
    """What one warp issues: counts by class, cycles of a scheduler by pipe, FLOPs and bytes."""

    instructions: float
    classes: dict[str, float]
    pipes: dict[str, float]  # of one scheduler for one warp
    flops: float
    shared_bytes: float
    global_bytes: float  # asked for, wherever they are
    spill_bytes: float


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's instructions, and the regions that need a number, in order of their start."""

    instructions: tuple[Instruction, ...]
    regions: tuple[Region, ...]

    def trace(self, turns: Sequence[float]) -> Iterator[tuple[int, float]]:
        """Instructions by index with how often they run. A loop's first turn stands by itself."""
        if len(turns) != len(self.regions):
            raise ValueError(f"{len(turns)} numbers for {len(self.regions)} regions")
        inner = dict(zip(self.regions, turns, strict=True))

        def walk(first, last, weight, within):
            at = first
            while at <= last:
                own = [r for r in within if r.first == at]
                if not own:
                    yield at, weight
                    at += 1
                    continue
                region = max(own, key=lambda r: r.last)
                rest = [r for r in within if r != region and r.inside(region)]
                count = inner[region]
                for times in (min(count, 1), count - 1):
                    if times > 0:
                        yield from walk(at, region.last, weight * times, rest)
                at = region.last + 1

        yield from walk(0, len(self.instructions) - 1, 1.0, list(self.regions))


def read(text: str) -> Code:
    """Of the output of ``nvdisasm -c -hex`` for one kernel."""
    found, labels, line = [], {}, None
    for text_line in text.splitlines():
        label = _LABEL.match(text_line)
        if label:
            labels[label[1]] = len(found)
            continue
        first = _LINE.match(text_line)
        if first:
            line = first
            continue
        high = _HIGH.match(text_line)
        if high and line:
            control = int(high[1], 16) >> 41
            signs, reads = control >> 5 & 7, control >> 8 & 7
            found.append(
                Instruction(
                    int(line[1], 16),
                    line[2],
                    line[3],
                    line[4],
                    control & 15,
                    None if signs == 7 else signs,
                    None if reads == 7 else reads,
                    tuple(i for i in range(6) if control >> 11 + i & 1),
                )
            )
            line = None
    while found and (found[-1].name == "NOP" or _stops(found, labels)):
        found.pop()  # padding, and the branch to itself that stops what runs too far
    return Code(tuple(found), tuple(_regions(found, labels)))


def _stops(code: list[Instruction], labels: dict[str, int]) -> bool:
    target = _TARGET.search(code[-1].operands)
    return bool(target) and labels.get(target[1]) == len(code) - 1


def _regions(code: list[Instruction], labels: dict[str, int]) -> Iterator[Region]:
    spans = []
    for at, x in enumerate(code):
        target = _TARGET.search(x.operands) if x.name == "BRA" else None
        if target:
            spans.append((at, labels[target[1]], x.predicate))
    loops = {Region(to, at, True) for at, to, _ in spans if to < at}
    skips = {
        Region(at + 1, to - 1, False)
        for at, to, predicate in spans
        if predicate and to - at > LEAST_SKIP
    }
    # What skips a loop is its guard: its turns are the mean over programs that may have none.
    skips = {s for s in skips if not any(loop.inside(s) for loop in loops)}
    return sorted(loops | skips, key=lambda r: (r.first, -r.last))


def kind(x: Instruction) -> str:
    """The class that an instruction is counted in."""
    name = x.name
    if name in ("HMMA", "HGMMA"):
        return name
    if name in _PIPE:
        return _PIPE[name][0]
    if name in ("LDS", "LDSM", "STS", "STSM"):
        return "shared"
    if name in ("LDG", "LDGSTS", "STG", "LD", "ST", "RED", "ATOMG"):
        return "global"
    if name in ("LDL", "STL"):
        return "spill"
    if name in ("SHFL", "BAR", "NOP"):
        return name.lower()
    return "other"


def _width(x: Instruction) -> int:
    """Bytes that a warp moves."""
    if x.name in ("LDSM", "STSM"):
        return WARP * 4 * int(_MATRICES.search(x.opcode)[1] or 1)
    parts = x.opcode.split(".")
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return WARP * size
    return WARP * 4


def product(x: Instruction) -> tuple[int, float, float]:
    """Of a tensor instruction: a warp's multiply-adds, its scheduler's cycles, bytes of shared."""
    rate = TENSOR[x.opcode.rpartition(".")[2]] / 4
    if x.name == "HMMA":
        m, n, k = map(int, _HMMA.match(x.opcode).groups())
        return m * n * k, m * n * k / (rate * LEGACY), 0
    n, k = map(int, _HGMMA.match(x.opcode).groups())
    # A warpgroup's product: a warp has 16 of the 64 rows, and a quarter of what all read.
    size = 32 // k
    rows = 16 * k * size if x.operands.partition(",")[2].lstrip().startswith("gdesc") else 0
    return 16 * n * k, max(16 * n * k / rate, _LEAST_HGMMA), rows + n * k * size / 4


def totals(code: Code, turns: Sequence[float]) -> Totals:
    """What one warp issues."""
    classes: dict[str, float] = collections.Counter()
    pipes: dict[str, float] = collections.Counter()
    number = flops = shared = moved = spilled = 0.0
    for at, weight in code.trace(turns):
        x = code.instructions[at]
        what = kind(x)
        number += weight
        classes[what] += weight
        if x.name in _PIPE:
            pipe, cycles = _PIPE[x.name]
            pipes["fma" if pipe == "imad" else pipe] += weight * cycles
        elif what in ("HMMA", "HGMMA"):
            count, cycles, size = product(x)
            flops += 2 * weight * count
            pipes["tensor"] += weight * cycles
            shared += weight * size
        elif what in ("shared", "shfl"):
            shared += weight * _width(x)
        elif what == "global":
            moved += weight * _width(x)
        elif what == "spill":
            spilled += weight * _width(x)
    # One for all four schedulers.
    pipes["l1"] = 4 * (shared + moved + spilled) / L1_BYTES
    return Totals(number, dict(classes), dict(pipes), flops, shared, moved, spilled)


def alone(code: Code, turns: Sequence[float]) -> float:
    """Cycles of one warp with the multiprocessor to itself, by :data:`LATENCY`."""
    clock = total = tensor_free = 0.0
    ready: dict[int, float] = collections.defaultdict(float)
    copies: list[float] = []  # to shared memory, since the last group of them
    groups: list[float] = []
    products: list[float] = []
    for at, weight in code.trace(turns):
        x, start = code.instructions[at], clock
        clock = max([clock, *(ready[i] for i in x.waits)])
        done = clock + LATENCY.get(x.name, _OTHER_LATENCY)
        if x.name == "LDGSTS":
            copies.append(done)
        elif x.name == "LDGDEPBAR":
            groups.append(max(copies, default=clock))
            copies = []
        elif x.name == "DEPBAR":
            left = int(x.operands.partition("0x")[2].split(",")[0].strip() or "0", 16)
            clock = max([clock, *groups[: len(groups) - left]])
        elif x.name == "HGMMA":
            tensor_free = max(clock, tensor_free) + product(x)[1]
            products.append(tensor_free + LATENCY["HGMMA"])
        elif x.opcode.startswith("WARPGROUP.DEPBAR"):
            clock = max([clock, *products[-1:]])
        elif x.name == "BAR":
            clock = done
        if x.signs is not None:
            ready[x.signs] = max(ready[x.signs], done)
        if x.reads is not None:
            ready[x.reads] = max(ready[x.reads], clock + _READ)
        clock += max(x.stall, 1)
        total += weight * (clock - start)
    return total


def disassemble(tool: str, path: str) -> str:
    """The text of the kernels of an ELF file."""
    done = subprocess.run([tool, "-c", "-hex", path], capture_output=True, text=True, check=True)
    return done.stdout
