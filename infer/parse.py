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
from .vectors.temperature import BatchTemperature, ExactTemperature

_SWITCH = {"true": True, "false": False}

# Every name: the stage it belongs to, the stage's field, and the type of what is given.
_NAMES: dict[str, tuple[type[Policy], str | None, Any]] = {
    "batch_temperature": (BatchTemperature, "value", float),
    "exact_temperature": (ExactTemperature, "value", float),
    "frequency_penalty": (PresenceFrequencyPenalty, "frequency", float),
    "greedy": (Greedy, None, None),
    "max_draws": (ExactTemperature, "max_draws", int),
    "min_new_tokens": (MinNewTokens, "count", int),
    "min_p": (MinP, "p", float),
    "no_repeat_ngram": (NoRepeatNgram, "size", int),
    "num_draws": (BatchTemperature, "num_draws", int),
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
# Stages that a policy has one of at most.
_EXCLUSIVE = {
    Greedy: "greedy",
    Temperature: "temperature",
    ExactTemperature: "exact_temperature",
    BatchTemperature: "batch_temperature",
}
# Settings of a stage that must be named with them: its own name, and its field.
_SETTINGS = {
    SoftTopP: ("soft_top_p_sharpness", "soft_top_p", "p"),
    ExactTemperature: ("max_draws", "exact_temperature", "value"),
    BatchTemperature: ("num_draws", "batch_temperature", "value"),
}


def parse_policy(text: str, stop_tokens: Sequence[int] = ()) -> Policy:
    """The policy that a comma-separated list names, its stages in the usual order.

    ``"temperature=0.7,top_p=0.95"``, ``"greedy"``, ``"repetition_penalty=1.1,min_p=0.05"``. Names
    without a number are ``greedy``, ``predicted`` and ``predicted_soft``. Of models that draw whole
    chunks: ``"exact_temperature=0.7"`` or ``"batch_temperature=0.5,num_draws=200"``.

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
    for kind, (setting, owner, field) in _SETTINGS.items():
        if kind in fields and field not in fields[kind]:
            raise InputError(f"{setting} is a setting of {owner}; give that too")
    both = [name for kind, name in _EXCLUSIVE.items() if kind in fields]
    if len(both) > 1:
        raise InputError(f"policy has {both[0]} and {both[1]}; give one of them")
    if MinNewTokens in fields:
        if not len(stop_tokens):
            raise InputError("min_new_tokens holds stop tokens back; there are none, leave it out")
        fields[MinNewTokens]["stop_tokens"] = list(stop_tokens)
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
