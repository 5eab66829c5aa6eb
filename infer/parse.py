"""``parse_policy("top_p=0.95,temperature=0.7")``: a policy from a command line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InputError
from .constraints import MinNewTokens
from .penalties import NoRepeatNgram, PresenceFrequencyPenalty, RepetitionPenalty
from .policy import Chain, Greedy, Policy, Temperature
from .truncation import MinP, Predicted, SoftTopP, TopK, TopP, Typical

_SWITCH = {"true": True, "false": False}

# Every name: the stage it belongs to, the stage's field, and the type of what is given.
_NAMES: dict[str, tuple[type[Policy], str | None, Any]] = {
    "frequency_penalty": (PresenceFrequencyPenalty, "frequency", float),
    "greedy": (Greedy, None, None),
    "min_new_tokens": (MinNewTokens, "count", int),
    "min_p": (MinP, "p", float),
    "no_repeat_ngram": (NoRepeatNgram, "size", int),
    "penalize_prompt": (PresenceFrequencyPenalty, "include_prompt", bool),
    "predicted": (Predicted, None, None),
    "predicted_soft": (Predicted, "soft", None),
    "presence_penalty": (PresenceFrequencyPenalty, "presence", float),
    "repetition_penalty": (RepetitionPenalty, "value", float),
    "soft_top_p": (SoftTopP, "p", float),
    "soft_top_p_sharpness": (SoftTopP, "sharpness", float),
    "temperature": (Temperature, "value", float),
    "top_k": (TopK, "k", int),
    "top_p": (TopP, "p", float),
    "typical": (Typical, "mass", float),
}


def parse_policy(text: str, stop_tokens: Sequence[int] = ()) -> Policy:
    """The policy that a comma-separated list names, its stages in the usual order.

    ``"temperature=0.7,top_p=0.95"``, ``"greedy"``, ``"repetition_penalty=1.1,min_p=0.05"``. Names
    without a number are ``greedy``, ``predicted`` and ``predicted_soft``.

    Args:
        text: the list.
        stop_tokens: that ``min_new_tokens`` holds back.

    Raises:
        InputError: an unknown name (with the nearest known one), one given twice, a value of the
            wrong type or outside its range, or stages that exclude each other.
    """
    fields: dict[type[Policy], dict[str, Any]] = {}
    given = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = (part.strip() for part in item.partition("="))
        if name not in _NAMES:
            raise InputError(f"policy has no {name!r}; {_nearest(name)}")
        if name in given:
            raise InputError(f"policy gives {name} twice; give it once")
        given.add(name)
        kind, field, convert = _NAMES[name]
        settings = fields.setdefault(kind, {})
        if convert is None:
            if separator:
                raise InputError(f"{name}={value} takes no value; write {name} alone")
            if field:
                settings[field] = True
        else:
            settings[field] = _converted(name, value, convert)
    if not fields:
        raise InputError(f"policy={text!r} names no stage; write for example temperature=0.7")
    if {Greedy, Temperature} <= fields.keys():
        raise InputError("policy has greedy and temperature; give one of them")
    if MinNewTokens in fields:
        if not len(stop_tokens):
            raise InputError("min_new_tokens holds stop tokens back; there are none, leave it out")
        fields[MinNewTokens]["stop_tokens"] = list(stop_tokens)
    if SoftTopP in fields and "p" not in fields[SoftTopP]:
        raise InputError("soft_top_p_sharpness is a setting of soft_top_p; give that too")
    stages = [kind(**settings) for kind, settings in fields.items()]
    stages.sort(key=lambda stage: stage.rank)
    return stages[0] if len(stages) == 1 else Chain(*stages)


def _converted(name: str, value: str, convert: Callable[[str], Any]) -> Any:
    try:
        return _SWITCH[value.lower()] if convert is bool else convert(value)
    except (ValueError, KeyError):
        kinds = {int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(f"{name}={value!r} must be {kinds[convert]}") from None


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, _NAMES, n=1)
    known = f"its names are {', '.join(_NAMES)}"
    return f"did you mean {near[0]!r}? {known}" if near else known
