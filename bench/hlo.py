"""The optimised program of a compiled function: instructions, their bytes, how often each runs.

Reads the HLO text, ``compiled.as_text()``; what the parts cost is for :mod:`schedule`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program's HLO text."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


_HEAD = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_LINE = re.compile(r"^  (ROOT )?%(\S+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*)[a-z0-9]*\[([\d,]*)\](\{[^{}]*\})?")
Computations = dict[str, dict[str, Instruction]]


def parse(hlo: str) -> tuple[Computations, str]:
    """The instructions of every computation, and the name of the entry."""
    computations: Computations = {}
    entry, body = "", None
    for line in lines(hlo):
        head = _HEAD.match(line)
        if head:
            body = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        found = _LINE.match(line)
        if found is None or body is None:
            continue
        kind, rest = _type(line[found.end() :])
        opcode, _, rest = rest.lstrip().partition("(")
        inner, rest = _until_closed(rest)
        operands = tuple(re.findall(r"%([^\s,()]+)", inner))
        if not operands and inner:
            rest = f"={inner}{rest}"  # a constant's value, a parameter's number
        body[found[2]] = Instruction(found[2], kind, opcode, operands, rest, bool(found[1]))
    return computations, entry


def lines(hlo: str) -> list[str]:
    """Its lines, each with those that go on with it: a kernel's metadata has lines of its own."""
    joined: list[str] = []
    for line in hlo.splitlines():
        if joined and line.startswith(('"', "}}")):
            joined[-1] += line
        else:
            joined.append(line)
    return joined


def _type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inner, rest = _until_closed(text[1:])
    return f"({inner})", rest


def _until_closed(text: str) -> tuple[str, str]:
    """What is before the parenthesis that closes, and what is after."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def hbm_bytes(kind: str) -> int:
    """Bytes of the arrays of an HLO type that are not in an on-chip memory (``S(1)``, ...)."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(kind):
        if "S(" in layout:
            continue
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 32)
        total += math.prod(int(x) for x in shape.split(",") if x) * bits // 8
    return total


def _called(instruction: Instruction, attribute: str) -> str | None:
    found = re.search(rf"\b{attribute}=%([^\s,]+)", instruction.rest)
    return found and found[1]


_NOT_WHAT_IT_DOES = re.compile(r",? *\b(metadata|frontend_attributes|sharding|backend_config)=.*")


def alike(computations: Computations, computation: str, instruction: Instruction) -> str:
    """A text that is the same for instructions that do the same: without names and metadata."""
    own = computations[computation]
    rest = _NOT_WHAT_IT_DOES.sub("", instruction.rest)
    for name in re.findall(r"=%([^\s,]+)", rest):
        inner = computations.get(name, {})
        order = {x: f"#{n}" for n, x in enumerate(inner)}
        inside = (
            f"{i.type} {i.opcode} {[order.get(x) for x in i.operands]} "
            + re.sub(r"=%[^\s,]+", "", _NOT_WHAT_IT_DOES.sub("", i.rest))
            for i in inner.values()
        )
        rest = rest.replace(f"=%{name}", "={" + "; ".join(inside) + "}")
    operands = [own[x].type if x in own else "" for x in instruction.operands]
    return f"{instruction.type} {instruction.opcode} {operands} {rest}"


def runs(
    computations: Computations,
    entry: str,
    turns: Callable[[Instruction], int | None] = lambda loop: None,
) -> dict[str, int | None]:
    """How often the entry and the bodies of its loops run; None under a condition or a call.

    ``turns`` says it of a ``while`` whose turns cannot be read.
    """
    found: dict[str, int | None] = {entry: 1}
    todo = [entry]
    while todo:
        name = todo.pop()
        for instruction in computations.get(name, {}).values():
            if instruction.opcode == "while":
                trips = while_trips(computations, name, instruction)
                trips = turns(instruction) if trips is None else trips
                each = None if trips is None or found[name] is None else found[name] * trips
                inner = [_called(instruction, "body"), _called(instruction, "condition")]
            elif instruction.opcode in ("conditional", "call"):
                each, inner = None, re.findall(r"%([^\s,{}]+)", instruction.rest)
            else:
                continue
            for computation in inner:
                if computation and computation not in found:
                    found[computation] = each
                    todo.append(computation)
    return found


def while_trips(computations: Mapping, computation: str, loop: Instruction) -> int | None:
    """Turns of a ``while``: as the compiler knows them, or read from its counter; or None.

    Read, where the condition is ``counter < constant`` and the counter an element of the loop's
    state that starts at a constant and to which the body adds one.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    own = computations[computation]
    condition = computations.get(_called(loop, "condition"), {})
    body = computations.get(_called(loop, "body"), {})
    root = next((i for i in condition.values() if i.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    index, limit = _element(condition, root.operands[0]), _constant(condition, root.operands[1])
    start = own.get(loop.operands[0])
    end = next((i for i in body.values() if i.root), None)
    if index is None or limit is None or start is None or end is None:
        return None
    if start.opcode != "tuple" or end.opcode != "tuple":
        return None
    first, last = _constant(own, start.operands[index]), _origin(body, end.operands[index])
    if first is None or last is None or last.opcode != "add":
        return None
    step = _constant(body, last.operands[1])
    if _element(body, last.operands[0]) != index or not step:
        return None
    return max(0, math.ceil((limit - first) / step))


def _origin(own: Mapping[str, Instruction], name: str) -> Instruction | None:
    """What is copied, of a copy."""
    found = own.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        found = own.get(found.operands[0])
    return found


def _constant(own: Mapping[str, Instruction], name: str) -> int | None:
    found = _origin(own, name)
    value = found and found.opcode == "constant" and re.match(r"=(-?\d+)", found.rest)
    return int(value[1]) if value else None


def _element(own: Mapping[str, Instruction], name: str) -> int | None:
    found = _origin(own, name)
    if found is None or found.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", found.rest)[1])
