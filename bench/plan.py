"""What a TPU's compiler plans for a whole program: every part of it, how often it runs, its cycles.

Joins the optimised program (:mod:`hlo`) with the schedules of its kernels and fusions
(:mod:`schedule`).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from hlo import Instruction, alike, hbm_bytes, parse, runs
from schedule import Assumed, Schedule, read, schedule

# An instruction that a SparseCore carries out, while the TensorCore goes on.
_SPARSE = 'async_execution_thread="sparsecore"'


@dataclasses.dataclass(frozen=True)
class Use:
    """A kernel or fusion of a program: how often it runs (None: not known), and its schedule."""

    instruction: Instruction
    runs: int | None
    schedule: Schedule | None
    hbm_bytes: int
    assumed: Assumed | None = None

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
    assumed: tuple[str, ...] = ()

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


Assume = Callable[[Instruction, Schedule | None], Assumed | None]


def _nothing(instruction: Instruction, found: Schedule | None) -> None:
    """Assumes nothing."""


def program(text: str, folder: str | pathlib.Path, assume: Assume = _nothing) -> Program:
    """Joins the optimised program (``compiled.as_text()``) with the schedules of its parts.

    Instructions that do the same are compiled once; the others take the schedule of the one that
    was. A part in a ``while`` loop runs as often as the loop turns, if that can be read. ``assume``
    is asked of every kernel or fusion without a sum, and, without a schedule, of every ``while``
    whose turns cannot be read (which has one number of turns).
    """
    texts, calls = read(folder)
    computations, entry = parse(text)
    assumed: dict[str, Assumed] = {}

    def ask(instruction, found):
        answer = assume(instruction, found)
        if answer is not None:
            assumed[instruction.name] = answer
        return answer

    def turns(loop):
        answer = ask(loop, None)
        return answer and answer.turns[0]

    often = runs(computations, entry, turns)
    where = {i.name: (c, i) for c, body in computations.items() for i in body.values()}
    twins = {alike(computations, *where[name]): name for name in texts if name in where}
    plain = {name: schedule(*pair) for name, pair in texts.items()}
    uses = []
    for name in calls:
        if name not in where:
            raise ValueError(f"{name} is called and not in the program: another program's folder")
        computation, instruction = where[name]
        same = name if name in texts else twins.get(alike(computations, *where[name]))
        found, answer = plain.get(same), None
        if found is not None and found.cycles is None:
            answer = ask(instruction, found)
            found = schedule(*texts[same], answer) if answer else found
        own = computations[computation]
        types = [own[x].type for x in instruction.operands if x in own]
        size = sum(map(hbm_bytes, [instruction.type, *types]))
        uses.append(Use(instruction, often.get(computation), found, size, answer))
    elsewhere = (
        i.name
        for c, i in where.values()
        if c in often and _SPARSE in i.rest and "-start" in i.opcode
    )
    ends = (i.type for i in computations[entry].values() if i.root or i.opcode == "parameter")
    said = dict.fromkeys(answer.what for answer in assumed.values())
    return Program(tuple(uses), tuple(elsewhere), sum(map(hbm_bytes, ends)), tuple(said))
