"""The zoo: which families there are, and how a model's configuration is written down."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from ..errors import InputError
from . import (
    calm_autoencoder_weights,
    calm_weights,
    fields,
    gemma2_weights,
    gpt_neox_weights,
    kimi_linear_weights,
    llada_weights,
)
from .calm import CALM, CALMConfig
from .calm_autoencoder import CALMAutoencoder, CALMAutoencoderConfig
from .exchange import Published
from .gemma2 import Gemma2, Gemma2Config
from .gpt_neox import GPTNeoX, GPTNeoXConfig
from .kimi_linear import KimiLinear, KimiLinearConfig
from .llada import LLaDA, LLaDAConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of the zoo.

    Attributes:
        config: its configuration, a frozen dataclass.
        model: its module, built as ``model(config, rngs=rngs)``.
        published: how the world writes its models down; None where it does not.
    """

    config: type
    model: type[nnx.Module]
    published: Published | None = None


# Every family of the zoo is one line here.
FAMILIES: dict[str, Family] = {
    "calm": Family(CALMConfig, CALM, calm_weights.PUBLISHED),
    "calm_autoencoder": Family(
        CALMAutoencoderConfig, CALMAutoencoder, calm_autoencoder_weights.PUBLISHED
    ),
    "gemma2": Family(Gemma2Config, Gemma2, gemma2_weights.PUBLISHED),
    "gpt_neox": Family(GPTNeoXConfig, GPTNeoX, gpt_neox_weights.PUBLISHED),
    "kimi_linear": Family(KimiLinearConfig, KimiLinear, kimi_linear_weights.PUBLISHED),
    "llada": Family(LLaDAConfig, LLaDA, llada_weights.PUBLISHED),
}


def family_of(config: Any) -> str:
    """The name under which this configuration's family is registered."""
    for name, family in FAMILIES.items():
        if type(config) is family.config:
            return name
    raise InputError(
        f"model={type(config).__name__} is no registered configuration; "
        f"use one of {sorted(family.config.__name__ for family in FAMILIES.values())}"
    )


def decoding_of(config: Any) -> str:
    """How a configuration's models make text: its ``decoding``, ``"next_token"`` if it has none.

    ``"next_token"``: logits at a position are of the token after it. ``"masked_diffusion"``: masks
    (``config.mask_token_id``) are filled in, in any order; logits at a position are of its own
    token, or with ``config.logit_shift`` of the next. ``"next_vector"``: there are no logits; the
    next chunk's latent is drawn. ``"reconstruction"``: no text is made; the model gives back what
    it reads.
    """
    return getattr(config, "decoding", "next_token")


def with_dtype(config: Any, dtype: str) -> Any:
    """The same configuration, that of its parts included, computing in another dtype."""
    parts = {
        name: with_dtype(getattr(config, name), dtype) for name in getattr(config, "PARTS", ())
    }
    return dataclasses.replace(config, dtype=dtype, **parts)


def run_as(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration of the same model, run in another way.

    Args:
        config: of any family.
        changes: fields that say how a model runs, and not what it is: ``scan_layers``, ``remat``,
            ``kda_chunk_size`` and the names of implementations. A text is read as ``--set`` of a
            run reads it.

    Raises:
        InputError: another field, or a value that the family refuses.
    """
    ways = [
        field.name
        for field in dataclasses.fields(config)
        if field.name in ("scan_layers", "remat", "kda_chunk_size")
        or field.name.endswith("_implementation")
    ]
    for name in changes.keys() - set(ways):
        raise InputError(
            f"{name}={changes[name]!r} does not say how a {family_of(config)} model runs; what "
            f"does: {', '.join(ways) or 'nothing'}"
        )
    hints, read = fields.field_types(type(config)), {}
    for name, value in changes.items():
        reader = fields.from_text if isinstance(value, str) else fields.from_json
        read[name] = reader(value, hints[name], name)
    return dataclasses.replace(config, **read)


def build_model(config: Any, key: jax.Array) -> nnx.Module:
    """A freshly initialised model of this configuration; its weights are a function of ``key``."""
    return FAMILIES[family_of(config)].model(config, rngs=nnx.Rngs(key))


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
    config_type = FAMILIES[family].config
    known = {field.name for field in dataclasses.fields(config_type)}
    for name in values.keys() - known:
        raise InputError(f"model.{name} is no field of {family!r}{fields.nearest(name, known)}")
    hints = typing.get_type_hints(config_type)
    return config_type(**{name: _from_json(v, hints[name]) for name, v in values.items()})


def _from_json(value: Any, hint: Any) -> Any:
    """A field's value: JSON has lists for tuples, and objects for configurations of parts."""
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        return hint(**{name: _from_json(v, Any) for name, v in value.items()})
    return tuple(value) if isinstance(value, list) else value
