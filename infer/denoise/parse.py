"""``parse_rule("threshold:0.9")`` and ``parse_cache("elastic:gamma=0.8")``: from a command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from ...errors import InputError
from .caches import NoCache
from .elastic import ElasticCache
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


def parse_cache(text: str) -> str | NoCache:
    """A cache's name as it is, or ``elastic`` with settings: ``"elastic:gamma=0.8,window=32"``.

    Raises:
        InputError: an unknown setting (with the nearest known one), or a value that does not fit.
    """
    name, colon, settings = (part.strip() for part in text.partition(":"))
    if not colon:
        return name
    if name != ElasticCache.name:
        raise InputError(f"cache={text!r}: {name} takes no settings")
    defaults = {field.name: field.default for field in dataclasses.fields(ElasticCache)}
    given: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            names = ", ".join(defaults)
            raise InputError(f"cache={text!r} has no {key!r}; {hint}its settings are {names}")
        kind = type(defaults[key])
        try:
            given[key] = _TRUTH[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise InputError(
                f"cache={text!r}: {key} takes a value like {defaults[key]}, not {value!r}"
            ) from None
    return ElasticCache(**given)


_TRUTH = {"true": True, "1": True, "false": False, "0": False}
