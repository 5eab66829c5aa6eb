"""Reads the static schedules that libtpu writes when it compiles for a TPU, present or absent.

Set ``LIBTPU_INIT_ARGS`` to :func:`arguments` before libtpu is loaded, compile, and give the folder
and the text of the optimised program to ``plan.py``. Of every kernel and fusion libtpu writes
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

A loop may turn as often as values say: over the groups of a product, or the filled blocks of a
cache. A caller who knows the values gives :class:`Assumed`; without it such a kernel has no sum.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re

_BUNDLES, _SLOTS = "packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization"
_FILE = re.compile(rf"\d+-(.+)-\d+-({_BUNDLES}|{_SLOTS})\.txt")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_END = re.compile(r"End region (\d+)")
_BRANCH = re.compile(r"sbr\.rel[^;}]*target bundleno = (\d+)")
_EXIT = re.compile(r"= scmp\.ge\S* %(\w+), (\d+) /\* loop exit test")
_COMPARE = re.compile(r"%(\w+) = scmp\.(ge|lt)\.s32\S* %(\w+), (\d+)")
_CORE = re.compile(r"%(\w+) = sld [^;}]*/\* megacore core id")
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
class Arm:
    """One way through a turn: code under a condition, with products and no condition around some.

    ``mxu`` and ``valu`` are the slots it takes of these units, by which arms can be told apart.
    """

    first: int
    last: int
    mxu: int
    valu: int


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What a workload says of the loops that turn as often as values say.

    ``what`` is the statement in words; ``turns`` are those of each such loop while the kernel runs
    once, in the order of the code; ``arms`` how often each arm runs, None where every turn runs
    them all.
    """

    what: str
    turns: tuple[int, ...]
    arms: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler scheduled for one kernel or fusion.

    ``cycles`` is None where a loop's number of turns is neither a constant nor assumed;
    ``at_least`` is what it is when such loops turn once. ``unknown`` are the loops that are no
    constants, ``arms`` those in them; ``cores`` how many share the turns. The other fields are of
    the grid loop, the outermost one that takes most cycles, or of all the code where there is none:
    cycles of a turn and turns, the share of its slots that each unit uses, and vector registers
    spilled and filled a turn.
    """

    bundles: int
    cycles: int | None
    at_least: int
    body: int | None
    trips: int | None
    share: dict[str, float]
    spills: int
    fills: int
    unknown: tuple[Loop, ...] = ()
    arms: tuple[Arm, ...] = ()
    cores: int = 1


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


def schedule(bundles: str, utilization: str, assumed: Assumed | None = None) -> Schedule:
    """Reads the two files of one kernel."""
    count, found = loops(bundles)
    _, units, capacity, _, *rows = utilization.splitlines()
    units, capacity = units.split(", "), [int(x) for x in capacity.split()]
    rows = [[int(x) for x in row.split()] for row in rows if row.strip()]
    if len(rows) != count:
        raise ValueError(f"{count} bundles, but slots of {len(rows)}: not of one kernel")
    unknown = tuple(sorted((a for a in found if a.trips is None), key=lambda a: (a.first, -a.last)))
    arms = _arms(bundles, unknown, rows, units)
    weight = [1] * count
    for loop in sorted(found, key=lambda a: a.first - a.last):
        # Turns that are assumed are those of all the turns around it.
        turns = dict(zip(unknown, assumed.turns, strict=True)).get(loop) if assumed else None
        for i in range(loop.first, loop.last + 1):
            weight[i] = turns if turns is not None else weight[i] * (loop.trips or 1)
    for arm, often in zip(arms, (assumed and assumed.arms) or (None,) * len(arms), strict=True):
        (around,) = {weight[arm.first], weight[arm.last]}
        for i in range(arm.first, arm.last + 1) if often is not None else ():
            weight[i] *= often / around
    outer = [a for a in found if not any(b != a and a.inside(b) for b in found)]

    def cycles(loop):
        return sum(weight[loop.first : loop.last + 1])

    grid = max(outer, key=cycles, default=Loop(0, count - 1, 1))
    trips = weight[grid.first] if assumed else grid.trips
    turns, span = trips or 1, range(grid.first, grid.last + 1)
    total = cycles(grid)
    used = {u: sum(weight[i] * rows[i][k] for i in span) for k, u in enumerate(units)}
    share = {u: used[u] / (c * total) for u, c in zip(units, capacity, strict=True) if ":" not in u}
    unsure = [] if assumed else unknown
    return Schedule(
        bundles=count,
        cycles=None if unsure else round(sum(weight)),
        at_least=round(sum(weight)),
        body=None if any(loop.first in span for loop in unsure) else round(total / turns),
        trips=trips,
        share={u: round(x, 4) for u, x in share.items()},
        spills=round(used["VSTORE:SPILL"] / turns),
        fills=round(used["VLOAD:FILL"] / turns),
        unknown=unknown,
        arms=arms,
        cores=_cores(bundles, count),
    )


def _branches(bundles: str) -> list[tuple[int, str, int]]:
    """Address, predicate and target of every branch."""
    address, found = -1, []
    for line in bundles.splitlines():
        head = _BUNDLE.match(line)
        address = int(head[1], 16) if head else address
        for predicate, target in re.findall(r"sbr\.rel \(!?%(\w+)\) target bundleno = (\d+)", line):
            found.append((address, predicate, int(target)))
    return found


def _arms(bundles: str, unknown: tuple[Loop, ...], rows: list, units: list) -> tuple[Arm, ...]:
    """What a branch inside one of the loops may leave out, of what takes slots of the MXU."""
    mxu, valu = units.index("MXU"), units.index("VALU")

    def used(span, unit):
        return sum(rows[i][unit] for i in range(span[0], span[1] + 1))

    spans = {
        (at + 1, target - 1)
        for at, _, target in _branches(bundles)
        if any(loop.first <= at < target <= loop.last for loop in unknown)
    }
    spans = sorted(span for span in spans if used(span, mxu))
    return tuple(
        Arm(*span, used(span, mxu), used(span, valu))
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    )


def _cores(bundles: str, count: int) -> int:
    """2 where the kernel asks which core of two it is on, and does not end if it is the second."""
    names = _CORE.findall(bundles)
    ends = {p for _, p, target in _branches(bundles) if target >= count - _MOST_DELAY}
    idle = (re.search(rf"%({'|'.join(ends)}) = scmp\.ne\S* %{n}, 0", bundles) for n in names)
    return 2 if names and not (ends and any(idle)) else 1


def read(folder: str | pathlib.Path) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """The two files of a folder by their HLO instruction, and what the top level calls."""
    files: dict[str, dict[str, pathlib.Path]] = {}
    for path in pathlib.Path(folder).iterdir():
        found = _FILE.fullmatch(path.name)
        if found:
            files.setdefault(found[1], {})[found[2]] = path
    top = files.pop("TLP", {}).get(_BUNDLES)
    calls = [] if top is None else re.findall(r"inlined_call [^;}]*/\* %(\S+) = ", top.read_text())
    texts = {
        name: (pair[_BUNDLES].read_text(), pair[_SLOTS].read_text())
        for name, pair in files.items()
        if len(pair) == 2 and not name.startswith("<")
    }
    return texts, calls
