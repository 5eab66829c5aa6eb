"""``parse_rule("threshold:0.9")``: an unmasking rule from a command line."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from ...errors import InputError
from .rules import (
    Dynamic,
    EntropyBounded,
    Factor,
    Independent,
    Rule,
    Threshold,
    TopCount,
    TopQuota,
    dream,
)
from .schedules import SCHEDULES

# Every name: how its rule is made of the text after the colon, None where there is none.
_NAMES: dict[str, Callable[[Any], Rule]] = {
    "low_confidence": lambda x: TopQuota(schedule=x or "even"),
    "random": lambda x: TopQuota("random", x or "even"),
    "sequential": lambda x: TopQuota("leftmost", x or "even"),
    "threshold": lambda x: Threshold(0.9 if x is None else float(x)),
    "factor": lambda x: Factor(1.0 if x is None else float(x)),
    "low_confidence_dynamic": lambda x: Dynamic(0.9 if x is None else float(x)),
    "entropy_bounded": lambda x: EntropyBounded(0.1 if x is None else float(x)),
    "count": lambda x: TopCount(1 if x is None else int(x)),
    "first_hitting": lambda x: TopCount(1 if x is None else int(x), "random"),
    "ancestral": lambda x: Independent(x or "linear"),
    "origin": lambda x: dream("origin"),
    "maskgit_plus": lambda x: dream("maskgit_plus", float(x or 0)),
    "topk_margin": lambda x: dream("topk_margin", float(x or 0)),
    "entropy": lambda x: dream("entropy", float(x or 0)),
}
_TAKES = {
    "low_confidence": f"a schedule (even, {', '.join(SCHEDULES)})",
    "ancestral": f"a schedule ({', '.join(SCHEDULES)})",
    "count": "a whole number of tokens",
    "first_hitting": "a whole number of tokens",
}
_TAKES |= dict.fromkeys(("random", "sequential"), _TAKES["low_confidence"])


def parse_rule(text: str) -> Rule:
    """The rule that ``name`` or ``name:number`` names.

    ``"low_confidence"`` (or ``random``, ``sequential``; with a schedule ``low_confidence:cosine``),
    ``"threshold:0.9"``, ``"factor:1.0"``, ``"low_confidence_dynamic:0.9"``,
    ``"entropy_bounded:0.1"``, ``"count:2"``, ``"first_hitting"``, ``"ancestral:linear"``, and
    Dream's ``"origin"``, ``"maskgit_plus"``, ``"topk_margin"``, ``"entropy"`` (with a temperature
    of the choice: ``entropy:0.2``).

    Raises:
        InputError: an unknown name (with the nearest known one), or a value that does not fit.
    """
    name, _, value = (part.strip() for part in text.partition(":"))
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"rule has no {name!r}; {hint}its names are {', '.join(_NAMES)}")
    if name == "origin" and value:
        raise InputError(f"rule={text!r}: origin takes no value")
    try:
        return _NAMES[name](value or None)
    except InputError:
        raise
    except ValueError:
        takes = _TAKES.get(name, "a number")
        raise InputError(f"rule={text!r}: {name} takes {takes}, not {value!r}") from None
