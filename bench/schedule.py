"""Reads the static schedules that libtpu writes when it compiles for a TPU, present or absent.

Set ``LIBTPU_INIT_ARGS`` to :func:`arguments` before libtpu is loaded, compile, and give the folder
and the text of the optimised program to :func:`program`. Of every kernel and fusion libtpu writes
the bundles of its VLIW code, one a cycle of the in-order core, and the slots that each bundle
takes. Here the bundles are counted, each as often as the loops around it turn.

What is read is the code as it was scheduled, after registers were allocated. In it, a bundle with
nothing to do is an empty one: the waits that the scheduler plans, for a product to leave the MXU
(some 130 cycles on v5e, 210 on TPU7x), for the XLU, for a load, are counted. In the final bundles
of the same dump they are not: a later pass, the "delay converter", makes delays of them.

What that is not: nothing was run. What the scheduler cannot plan takes no time: DMAs and the
semaphores that wait for them, conflicts of VMEM's banks, instructions to be fetched. Code under a
condition counts as if it always ran: a first step's initialisation counts in every step. The turns
in which a pipeline only fills or drains do not count, nor does what the top level does between
kernels.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re

from hlo import Instruction, alike, hbm_bytes, parse, runs

# An instruction that a SparseCore carries out, while the TensorCore goes on.
_SPARSE = 'async_execution_thread="sparsecore"'
_BUNDLES, _SLOTS = "packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization"
_FILE = re.compile(rf"\d+-(.+)-\d+-({_BUNDLES}|{_SLOTS})\.txt")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_END = re.compile(r"End region (\d+)")
_BRANCH = re.compile(r"sbr\.rel[^;}]*target bundleno = (\d+)")
_EXIT = re.compile(r"= scmp\.ge\S* %(\w+), (\d+) /\* loop exit test")
_COMPARE = re.compile(r"%(\w+) = scmp\.(ge|lt)\.s32\S* %(\w+), (\d+)")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
# After a branch the core still runs a few bundles: 4 on v5, 6 on TPU7x.
_MOST_DELAY = 8


def arguments(folder: str | pathlib.Path) -> str:
    """Options for ``LIBTPU_INIT_ARGS`` to write the schedules into a folder, and no other dumps."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=^({_BUNDLES}|{_SLOTS})"
    )


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a kernel: its first and last bundle, and its turns; None where they are dynamic."""

    first: int
    last: int
    trips: int | None

    def inside(self, other: Loop) -> bool:
        """Whether it is the other loop or a part of it."""
        return other.first <= self.first and self.last <= other.last


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler scheduled for one kernel or fusion.

    ``cycles`` is None where a loop's number of turns is not a constant; ``at_least`` is what it is
    when such loops turn once. The other fields are of the grid loop, the outermost one that takes
    most cycles, or of all the code where there is none: cycles of a turn and turns, the share of
    its slots that each unit uses, and vector registers spilled and filled a turn.
    """

    bundles: int
    cycles: int | None
    at_least: int
    body: int | None
    trips: int | None
    share: dict[str, float]
    spills: int
    fills: int


def loops(bundles: str) -> tuple[int, list[Loop]]:
    """Number of bundles, empty ones too, and the loops, of a ``packed-bundles-post-ra.txt``."""
    address, lines = -1, []
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    branches = []
    for line in bundles.splitlines():
        found = _BUNDLE.match(line)
        if found:
            address = int(found[1], 16)
        elif address < 0:
            continue  # the legend
        lines.append((address, line))
        for region in _START.findall(line):
            starts.setdefault(region, address)
        ends |= dict.fromkeys(_END.findall(line), address)
        branches += [(address, int(target)) for target in _BRANCH.findall(line)]
    spans = []
    for branch, first in branches:
        if first <= branch:
            delayed = (end for name, end in ends.items() if starts.get(name) == first)
            last = max((x for x in delayed if branch <= x <= branch + _MOST_DELAY), default=branch)
            spans.append((first, last))

    def inside(span):
        inner = [s for s in spans if s != span and span[0] <= s[0] and s[1] <= span[1]]
        return [
            line
            for at, line in lines
            if span[0] <= at <= span[1] and not any(s[0] <= at <= s[1] for s in inner)
        ]

    names = _Names(bundles)
    return address + 1, [Loop(*span, _trips("\n".join(inside(span)), names)) for span in spans]


def _trips(body: str, names: _Names) -> int | None:
    """Turns of a loop that counts from one constant to another; None of any other loop.

    A pipeline over a grid turns more often than its grid has steps, while it fills and drains: of
    those turns, the ones that its own guard keeps from the work are not counted.
    """
    tests = _EXIT.findall(body)
    if len(tests) != 1:
        return None
    counter, limit = names.origin(tests[0][0]), int(tests[0][1])
    step = names.sums.get(counter)
    if step is None:
        return None
    index = names.origin(step[1])
    compared = [
        (name, how, int(bound))
        for name, how, x, bound in _COMPARE.findall(body)
        if names.origin(x) == index
    ]
    least = {name: bound for name, how, bound in compared if how == "ge"}
    below = {name: bound for name, how, bound in compared if how == "lt"}
    for one, other in re.findall(r"= pnand %(\w+), %(\w+)", body):
        if one in least and other in below:
            return below[other] - least[one]
    first = names.constants.get(names.firsts.get(index, ""))
    if first is None:
        return None
    turns = math.ceil((limit - first) / step[0])
    stages = max(map(int, _STAGE.findall(body)), default=0)
    for guard, skipped in below.items():
        if stages and re.search(rf"sbr\.rel \(%{guard}\)", body):
            return turns - skipped
    return None if stages else turns


class _Names:
    """Scalars of a kernel: what they were called before they were spilled, sums and constants."""

    def __init__(self, text: str):
        slots = dict(re.findall(r"sst \[smem:\[#(\w+_spill)\]\] %(\w+)", text))
        filled = re.findall(r"%(\w+) = sld \[smem:\[#(\w+_spill)\]\]", text)
        self._spilled = {name: slots[slot] for name, slot in filled if slot in slots}
        sums = re.findall(r"%(\w+) = sadd\.s32 (\d+), %(\w+)", text)
        self.sums = {name: (int(step), old) for name, step, old in sums}
        self.firsts = dict(re.findall(r"%(\w+) = sphi %(\w+), %", text))
        constants = re.findall(r"%(\w+) = smov (\d+)\b", text)
        self.constants = {name: int(value) for name, value in constants}

    def origin(self, name: str) -> str:
        """The name of the value that was spilled, of one that is filled; else the name."""
        seen = set()
        while name in self._spilled and name not in seen:
            seen.add(name)
            name = self._spilled[name]
        return name


def schedule(bundles: str, utilization: str) -> Schedule:
    """Reads the two files of one kernel."""
    count, found = loops(bundles)
    _, units, capacity, _, *rows = utilization.splitlines()
    units, capacity = units.split(", "), [int(x) for x in capacity.split()]
    rows = [[int(x) for x in row.split()] for row in rows if row.strip()]
    if len(rows) != count:
        raise ValueError(f"{count} bundles, but slots of {len(rows)}: not of one kernel")
    weight = [1] * count
    for loop in found:
        for i in range(loop.first, loop.last + 1):
            weight[i] *= loop.trips or 1
    unknown = [loop for loop in found if loop.trips is None]
    outer = [a for a in found if not any(b != a and a.inside(b) for b in found)]

    def cycles(loop):
        return sum(weight[loop.first : loop.last + 1])

    grid = max(outer, key=cycles, default=Loop(0, count - 1, 1))
    turns, span = grid.trips or 1, range(grid.first, grid.last + 1)
    total = cycles(grid)
    used = {u: sum(weight[i] * rows[i][k] for i in span) for k, u in enumerate(units)}
    share = {u: used[u] / (c * total) for u, c in zip(units, capacity, strict=True) if ":" not in u}
    return Schedule(
        bundles=count,
        cycles=None if unknown else sum(weight),
        at_least=sum(weight),
        body=None if any(loop.first in span for loop in unknown) else round(total / turns),
        trips=grid.trips,
        share={u: round(x, 4) for u, x in share.items()},
        spills=round(used["VSTORE:SPILL"] / turns),
        fills=round(used["VLOAD:FILL"] / turns),
    )


def read(folder: str | pathlib.Path) -> tuple[dict[str, Schedule], list[str]]:
    """Every schedule of a folder by its HLO instruction, and what the top level calls."""
    files: dict[str, dict[str, pathlib.Path]] = {}
    for path in pathlib.Path(folder).iterdir():
        found = _FILE.fullmatch(path.name)
        if found:
            files.setdefault(found[1], {})[found[2]] = path
    top = files.pop("TLP", {}).get(_BUNDLES)
    calls = [] if top is None else re.findall(r"inlined_call [^;}]*/\* %(\S+) = ", top.read_text())
    schedules = {
        name: schedule(pair[_BUNDLES].read_text(), pair[_SLOTS].read_text())
        for name, pair in files.items()
        if len(pair) == 2 and not name.startswith("<")
    }
    return schedules, calls


@dataclasses.dataclass(frozen=True)
class Use:
    """A kernel or fusion of a program: how often it runs (None: not known), and its schedule."""

    instruction: Instruction
    runs: int | None
    schedule: Schedule | None
    hbm_bytes: int

    @property
    def cycles(self) -> int | None:
        """Of all its runs."""
        if self.runs is None or self.schedule is None or self.schedule.cycles is None:
            return None
        return self.runs * self.schedule.cycles


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on the TensorCore, the names of what SparseCores do beside it, bytes in and out."""

    uses: tuple[Use, ...]
    elsewhere: tuple[str, ...]
    hbm_bytes: int

    @property
    def cycles(self) -> int | None:
        """The sum; None where a part of it is not known."""
        parts = [use.cycles for use in self.uses]
        return None if None in parts else sum(parts)

    @property
    def at_least(self) -> int:
        """The sum, with once for every number of turns or runs that is not known."""
        return sum((u.runs or 1) * u.schedule.at_least for u in self.uses if u.schedule)

    @property
    def unknown(self) -> list[str]:
        """Names of the parts that are not known."""
        return [use.instruction.name for use in self.uses if use.cycles is None]


def program(text: str, folder: str | pathlib.Path) -> Program:
    """Joins the optimised program (``compiled.as_text()``) with the schedules of its parts.

    Instructions that do the same are compiled once; the others take the schedule of the one that
    was. A part in a ``while`` loop runs as often as the loop turns, if that can be read.
    """
    schedules, calls = read(folder)
    computations, entry = parse(text)
    often = runs(computations, entry)
    where = {i.name: (c, i) for c, body in computations.items() for i in body.values()}
    twins = {alike(computations, *where[name]): name for name in schedules if name in where}
    uses = []
    for name in calls:
        if name not in where:
            raise ValueError(f"{name} is called and not in the program: another program's folder")
        computation, instruction = where[name]
        same = name if name in schedules else twins.get(alike(computations, *where[name]))
        own = computations[computation]
        types = [own[x].type for x in instruction.operands if x in own]
        size = sum(map(hbm_bytes, [instruction.type, *types]))
        uses.append(Use(instruction, often.get(computation), schedules.get(same), size))
    elsewhere = (
        i.name
        for c, i in where.values()
        if c in often and _SPARSE in i.rest and "-start" in i.opcode
    )
    ends = (i.type for i in computations[entry].values() if i.root or i.opcode == "parameter")
    return Program(tuple(uses), tuple(elsewhere), sum(map(hbm_bytes, ends)))
