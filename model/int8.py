"""Weight-only int8 on any family: kernels become 8-bit integers with a scale for each output.

Calibration and rounding are qwix's. Its interception of operations is not used: it recognises
parameters by the identity of an array inside a module that runs, which a stack scanned over plain
arrays has not, and then quantizes nothing, silently (docs/decisions/0005-lora-and-int8.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import InputError
from ..layers.int8 import SCALE, stored
from ..layers.linear import Linear
from ..layers.moe import Experts
from ..layers.stack import Stack
from ..sharding import path_name, shardings, split
from .handle import Model
from .targets import check_patterns, matching


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A parameter that can be int8: attribute ``name`` of ``owner``."""

    owner: nnx.Module
    name: str
    contracted: tuple[int, ...]  # its dimensions, stacked ones not counted, that a product sums

    @property
    def param(self) -> nnx.Param:
        return getattr(self.owner, self.name)

    @property
    def axes(self) -> tuple[str | None, ...]:
        return self.param.get_metadata()["axes"]

    @property
    def quantized(self) -> bool:
        return hasattr(self.owner, self.name + SCALE)

    def scale_axes(self, shape: Sequence[int]) -> tuple[str | None, ...]:
        """The axes of a scale of this shape: it lies where the values lie that it is for."""
        own = shape[len(shape) - len(self.axes) :]
        return tuple(None if size == 1 else a for size, a in zip(own, self.axes, strict=True))

    def replace(self, values: jax.Array, scale: jax.Array) -> None:
        axes = self.axes
        scale_axes = self.scale_axes(scale.shape)
        setattr(self.owner, self.name, nnx.Param(values, axes=axes))
        setattr(self.owner, self.name + SCALE, nnx.Param(scale, axes=scale_axes))


def quantize_weights(
    model: Model,
    bits: int = 8,
    targets: Sequence[str] | None = None,
    tile_size: int | None = None,
) -> Model:
    """The model with weights in int8; it is called, decoded and adapted as before.

    A weight takes a quarter of its float32 bytes, half of its bfloat16 ones, and each output
    channel has a float32 scale. Embeddings, norms, biases, routers and convolutions stay. Arrays
    that stay are shared with ``model``. Needs qwix to make, not to run.

    Args:
        model: of any family, on any mesh.
        bits: 8.
        targets: regular expressions that are searched for in the paths of weights
            (``stack.body.0.mixer.q_proj.kernel``, ``stack.body.0.ffn.experts.gate``); None is every
            linear map and expert of the blocks, which leaves the output head as it is.
        tile_size: a scale for every so many inputs of an output, instead of one for all: smaller
            errors, slower products. It must divide the last contracted dimension.

    Raises:
        InputError: qwix is missing, ``bits`` is not 8, a target is found nowhere or is int8
            already, or a tile does not divide.
    """
    if bits != 8:
        raise InputError(f"bits={bits} is not supported; use 8")
    module = model.module()
    with model.context():
        quantize_module(module, targets, tile_size, model)
    graphdef, params = split(module)
    return dataclasses.replace(model, graphdef=graphdef, params=params)


def quantize_module(
    module: nnx.Module,
    targets: Sequence[str] | None = None,
    tile_size: int | None = None,
    model: Model | None = None,
) -> nnx.Module:
    """``module`` itself, its weights in int8; also inside a function that is traced.

    Args:
        module: of any family.
        targets, tile_size: as for :func:`quantize_weights`.
        model: whose mesh and rules lay the new arrays out.

    Raises:
        InputError: as :func:`quantize_weights`.
    """
    quantize = _quantizer()
    weights = _weights(module)
    if targets is None:
        names = _in_blocks(module, weights)
    else:
        names = matching(weights, check_patterns(targets, "targets"), "targets")
    for name in names:
        weight = weights[name]
        if weight.quantized:
            raise InputError(f"targets: {name} is int8 already; quantize a model once")
        channelwise, tiled = _granularity(name, weight, tile_size)
        array = weight.param[...]
        stacked = array.ndim - len(weight.axes)
        one = partial(
            quantize,
            channelwise=(*range(stacked), *(stacked + i for i in channelwise)),
            tiled={stacked + i: size for i, size in tiled.items()},
        )
        weight.replace(*_laid_out(one, name, array, weight, model))
    return module


def as_stored(module: nnx.Module, stored: Mapping[str, Any]) -> nnx.Module:
    """``module`` itself, its weights int8 where a checkpoint has them so; for abstract use.

    Args:
        module: freshly built.
        stored: ``(dtype, shape)`` of the checkpoint's parameters, by name.
    """
    for name, weight in _weights(module).items():
        if name in stored and name + SCALE in stored:
            (values, shape), (dtype, sizes) = stored[name], stored[name + SCALE]
            weight.replace(jnp.zeros(shape, values), jnp.ones(sizes, dtype))
    return module


def is_int8(name: str, x: Any) -> bool:
    """Whether the parameter of this name is part of an int8 weight, whose dtypes mean something."""
    return x.dtype == jnp.int8 or name.endswith(SCALE)


def dequantize_weights(model: Model, dtype: str = "float32") -> Model:
    """The model with floating-point weights: what the int8 ones stand for, not what they were.

    Args:
        model: what :func:`quantize_weights` returned, or a model with such weights.
        dtype: of the weights.

    Raises:
        InputError: no weight is int8.
    """
    module = model.module()
    found = {name: x for name, x in _weights(module).items() if x.quantized}
    if not found:
        raise InputError("dequantize_weights: no weight of the model is int8")
    for weight in found.values():
        place = weight.param[...].sharding
        with model.context():
            widen = jax.jit(lambda x: x.astype(dtype), out_shardings=place)
            array = widen(stored(weight.owner, weight.name))
        setattr(weight.owner, weight.name, nnx.Param(array, axes=weight.axes))
        delattr(weight.owner, weight.name + SCALE)
    graphdef, params = split(module)
    return dataclasses.replace(model, graphdef=graphdef, params=params)


def _quantizer():
    """``(array, channelwise, tiled) -> (int8 values, float32 scale)``, by qwix."""
    try:
        import qwix
    except ImportError:
        raise InputError(
            "int8 weights are made by qwix, which is not installed: pip install 'jaxalope[quant]'"
        ) from None

    def quantize(array, *, channelwise, tiled):
        made = qwix.quantize(
            array.astype(jnp.float32),
            jnp.int8,
            channelwise_axes=channelwise,
            tiled_axes=tiled,
            calibration_method="absmax",
        )
        return made.qvalue, made.scale

    return quantize


def _weights(module: nnx.Module) -> dict[str, _Weight]:
    """Every weight that can be int8, by its path."""
    found = {}
    for path, node in nnx.iter_modules(module):
        if isinstance(node, Linear):
            inputs = len(node.kernel.get_metadata()["axes"]) - len(node.out_axes)
            found[path_name((*path, "kernel"))] = _Weight(node, "kernel", tuple(range(inputs)))
        elif isinstance(node, Experts):
            for name in ("gate", "up", "down"):
                found[path_name((*path, name))] = _Weight(node, name, (1,))
    return dict(sorted(found.items()))


def _in_blocks(module: nnx.Module, names: Iterable[str]) -> list[str]:
    stacks = [path_name(p) + "." for p, node in nnx.iter_modules(module) if isinstance(node, Stack)]
    found = [name for name in names if name.startswith(tuple(stacks))]
    if not found:
        raise InputError("targets=None is the weights of the blocks, and this model has no stack")
    return found


def _granularity(name, weight, tile_size) -> tuple[list[int], dict[int, int]]:
    """``(dimensions of one scale an element, {tiled dimension: size})``, of an unstacked weight."""
    ndim, contracted = len(weight.axes), weight.contracted
    outputs = [i for i in range(ndim) if i not in contracted]
    if tile_size is None:
        return outputs, {}
    *leading, last = contracted
    size = weight.param.shape[last - ndim]
    if tile_size < 1 or size % tile_size:
        raise InputError(
            f"tile_size={tile_size} does not divide the {size} inputs of {name}; use one that "
            "does, or name other targets"
        )
    return sorted([*leading, *outputs]), {last: tile_size}


def _laid_out(quantize, name, array, weight, model):
    """``quantize(array)``, each result where the rules put it."""
    if model is None or model.mesh is None:
        return quantize(array) if isinstance(array, jax.core.Tracer) else jax.jit(quantize)(array)
    values, scale = jax.eval_shape(quantize, array)
    stacked = ("layers",) * (array.ndim - len(weight.axes))
    places = shardings(
        {name: values, name + SCALE: scale},
        {name: stacked + weight.axes, name + SCALE: stacked + weight.scale_axes(scale.shape)},
        model.mesh,
        model.rules,
    )
    return jax.jit(quantize, out_shardings=tuple(places.values()))(array)
