"""The zoo: which families there are, and how a model's configuration is written down."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import jax
from flax import nnx

from ..errors import InputError
from .kimi_linear import KimiLinear, KimiLinearConfig

# family name -> (configuration, model). Every model of the zoo is one line here.
FAMILIES: dict[str, tuple[type, type[nnx.Module]]] = {
    "kimi_linear": (KimiLinearConfig, KimiLinear),
}


def family_of(config: Any) -> str:
    """The name under which this configuration's family is registered."""
    for family, (config_type, _) in FAMILIES.items():
        if type(config) is config_type:
            return family
    raise InputError(
        f"model={type(config).__name__} is no registered configuration; "
        f"use one of {sorted(c.__name__ for c, _ in FAMILIES.values())}"
    )


def build_model(config: Any, key: jax.Array) -> nnx.Module:
    """A freshly initialised model of this configuration; its weights are a function of ``key``."""
    _, model_type = FAMILIES[family_of(config)]
    return model_type(config, rngs=nnx.Rngs(key))


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-able values, with its family under ``"family"``."""
    return {"family": family_of(config), **dataclasses.asdict(config)}


def config_from_dict(values: dict[str, Any]) -> Any:
    """The inverse of :func:`config_to_dict`.

    Raises:
        InputError: an unknown family or field; names the nearest known one.
    """
    values = dict(values)
    family = values.pop("family", None)
    if family not in FAMILIES:
        raise InputError(f"model.family={family!r} is not one of {sorted(FAMILIES)}")
    config_type, _ = FAMILIES[family]
    known = {field.name for field in dataclasses.fields(config_type)}
    for name in values.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"model.{name} is no field of {family!r}{hint}")
    # JSON has lists only; every sequence field of a configuration is a tuple.
    return config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
