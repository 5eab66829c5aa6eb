"""Retrofits: parts added to a finished model, before its parameters are split off.

A :class:`Retrofit` performs its surgery in place. It may set attributes, new modules among them,
wherever in the module it likes; but every parameter that was there keeps its path and its value. So
the base's checkpoint fits by name, a frozen base stays byte-identical, and ``optimizer.trainable``
can name what is new. :func:`attach`, the one door, checks it.

A new kind is a class here, a line in ``RETROFITS`` and a member of ``AnyRetrofit``; building,
training, ``init_from`` and loading need nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import InputError
from ..layers.decoding_heads import DecodingHeads
from ..sharding import param_axes, path_name, shardings, split
from .handle import Model
from .lora import LoRAConfig
from .registry import build_model, decoding_of


@runtime_checkable
class Retrofit(Protocol):
    """Settings of one kind of surgery: a frozen dataclass."""

    kind: ClassVar[str]

    def attach(self, module: nnx.Module, key: jax.Array) -> None:
        """Perform it; new parameters are drawn from ``key``."""


@dataclasses.dataclass(frozen=True)
class DecodingHeadsConfig:
    """AutoDeco's two heads as ``module.decoding_heads``, for any model with the usual doors.

    Called as ``module.decoding_heads(hidden, logits)``, where ``hidden`` is what
    ``module.hidden_states`` returned; the model's own outputs stay what they were.

    Attributes:
        width: of the heads' hidden layers.
        initial_temperature, initial_top_p: what fresh heads say of every token.
    """

    kind: ClassVar[str] = "decoding_heads"

    width: int = 256
    initial_temperature: float = 1.0
    initial_top_p: float = 0.95

    def __post_init__(self):
        if self.width < 1:
            raise InputError(f"retrofits.width={self.width} must be 1 or more; 256 as published")
        if not 0 < self.initial_temperature < 2:
            raise InputError(
                f"retrofits.initial_temperature={self.initial_temperature} must be between 0 and "
                "2, the range of the head; 1 leaves the model as it is"
            )
        if not 0 < self.initial_top_p < 1:
            raise InputError(
                f"retrofits.initial_top_p={self.initial_top_p} must be above 0 and below 1 (at 1 "
                "the head would get no gradient)"
            )

    def attach(self, module: nnx.Module, key: jax.Array) -> None:
        """Set ``module.decoding_heads``."""
        module.decoding_heads = DecodingHeads(
            hidden_size(module),
            self.width,
            rngs=nnx.Rngs(key),
            temperature=self.initial_temperature,
            top_p=self.initial_top_p,
        )


AnyRetrofit = DecodingHeadsConfig | LoRAConfig

RETROFITS: dict[str, type[AnyRetrofit]] = {
    retrofit.kind: retrofit for retrofit in (DecodingHeadsConfig, LoRAConfig)
}


def attach(module: nnx.Module, retrofits: Sequence[Retrofit], key: jax.Array) -> nnx.Module:
    """``module`` itself, with every retrofit attached in order.

    Args:
        module: of any family; concrete, or abstract inside ``nnx.eval_shape``.
        retrofits: at most one of a kind.
        key: for their initial values; those of one kind do not depend on the others.

    Raises:
        InputError: the module has one of this kind already, or lacks what the retrofit needs.
        TypeError: a retrofit replaced or moved a parameter that was there.
    """
    for retrofit in retrofits:
        if retrofit.kind in attached(module):
            raise InputError(f"retrofits: the model has {retrofit.kind} already; attach them once")
        before = _leaves(module)
        retrofit.attach(module, jax.random.fold_in(key, zlib.crc32(retrofit.kind.encode())))
        after = _leaves(module)
        for name, leaf in before.items():
            if after.get(name) is not leaf:
                raise TypeError(f"{retrofit!r} replaced or moved the parameter {name}")
        module.retrofits = (*getattr(module, "retrofits", ()), retrofit)
    return module


def attached(module: nnx.Module) -> tuple[str, ...]:
    """The kinds of retrofits that a module has."""
    return tuple(retrofit.kind for retrofit in getattr(module, "retrofits", ()))


def build(config: Any, retrofits: Sequence[Retrofit], key: jax.Array) -> nnx.Module:
    """A freshly initialised model with its retrofits; the base's weights are those without them."""
    return attach(build_model(config, key), retrofits, key)


def hidden_size(module: nnx.Module) -> int:
    """The width of what ``module.hidden_states`` returns, found by tracing it; nothing is computed.

    Raises:
        InputError: the module has no ``hidden_states`` and ``logits``.
    """
    drawn = decoding_of(getattr(module, "config", None)) == "next_vector"
    for door in ("hidden_states", "logits"):
        if not callable(getattr(module, door, None)) or (drawn and door == "logits"):
            raise InputError(
                f"model={type(module).__name__} has no `{door}`: it predicts no tokens, so there "
                "is nothing for decoding heads to read"
            )
    graphdef, params = split(module)
    # As many rows and positions as there are devices divide over any mesh.
    size = math.prod(jax.sharding.get_abstract_mesh().axis_sizes)
    tokens = jax.ShapeDtypeStruct((size, size), jnp.int32)
    hidden = jax.eval_shape(
        lambda params, tokens: nnx.merge(graphdef, params).hidden_states(tokens)[0], params, tokens
    )
    return hidden.shape[-1]


def add_retrofits(model: Model, retrofits: Sequence[Retrofit], key: jax.Array) -> Model:
    """``model`` with retrofits, laid out on its mesh; the base's arrays are shared, not copied.

    Raises:
        InputError: as :func:`attach`.
    """
    before = _leaves(module := model.module())
    with model.context():
        attach(module, retrofits, key)
        graphdef, params = split(module)
        if model.mesh is not None:
            places = shardings(params, param_axes(module), model.mesh, model.rules)
            params = jax.tree.map_with_path(
                lambda path, x, place: x if path_name(path) in before else jax.device_put(x, place),
                params,
                places,
            )
    return dataclasses.replace(model, graphdef=graphdef, params=params)


def add_decoding_heads(model: Model, key: jax.Array, **settings: Any) -> Model:
    """``model`` with fresh decoding heads; ``settings`` are :class:`DecodingHeadsConfig`'s."""
    return add_retrofits(model, [DecodingHeadsConfig(**settings)], key)


# ------------------------------------------------------------------------------------------ JSON


def retrofits_from_list(values: Sequence[dict[str, Any]]) -> tuple[AnyRetrofit, ...]:
    """The retrofits of an experiment's JSON: one object each, with its ``kind``.

    Raises:
        InputError: an unknown kind or field.
    """
    found = []
    for value in values:
        # JSON has lists only; every sequence field of a retrofit is a tuple.
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        kind = fields.pop("kind", None)
        if kind not in RETROFITS:
            raise InputError(f"retrofits.kind={kind!r} is not one of {sorted(RETROFITS)}")
        known = {field.name for field in dataclasses.fields(RETROFITS[kind])}
        if unknown := fields.keys() - known:
            raise InputError(f"retrofits.{min(unknown)} is no field of {kind!r}")
        found.append(RETROFITS[kind](**fields))
    return tuple(found)


def retrofits_to_list(module: nnx.Module) -> list[dict[str, Any]]:
    """The inverse of :func:`retrofits_from_list`, of what is attached to a module."""
    return [
        {"kind": retrofit.kind, **dataclasses.asdict(retrofit)}
        for retrofit in getattr(module, "retrofits", ())
    ]


def _leaves(module: nnx.Module) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(split(module)[1])
    return {path_name(path): leaf for path, leaf in leaves}
