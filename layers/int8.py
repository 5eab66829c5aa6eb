"""Weights kept as 8-bit integers and a scale, and the product with them.

A module keeps such a weight as two parameters, ``kernel`` and ``kernel_scale``: plain arrays with
logical axes, which are stacked, sharded, unrolled and checkpointed as any others. What makes them
is :mod:`jaxalope.model.int8`; here they are used. Activations stay floating point.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..sharding import constrain, project, repeat

Axes = tuple[str | None, ...]

SCALE = "_scale"  # what the name of a weight's scale has after the weight's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """``values * scale``, the scale repeated over each tile of the values.

    Fields are arrays, or what stands for them in a tree of axes or shardings.

    Attributes:
        values: int8 ``[..., *in, *out]``.
        scale: floating point, of as many dimensions. A size of 1 is one scale for the dimension,
            the values' own size is one for each element, a divisor of it is one for each tile.
    """

    values: Any
    scale: Any

    def astype(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The weight as one array; computed in float32."""
        return (self.values.astype(jnp.float32) * self._repeated()).astype(dtype)

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return self.values.ndim

    def _repeated(self):
        scale = self.scale.astype(jnp.float32)
        for axis, (size, scales) in enumerate(zip(self.values.shape, scale.shape, strict=True)):
            if 1 < scales < size:
                scale = repeat(scale, size // scales, axis)
        return scale


def stored(module: nnx.Module, name: str) -> Array | Int8:
    """The weight ``name`` of a module as it is kept; either form has ``astype``."""
    values, scale = getattr(module, name)[...], getattr(module, name + SCALE, None)
    return values if scale is None else Int8(values, scale[...])


def stored_axes(module: nnx.Module, name: str) -> Axes | Int8:
    """The logical axes of what :func:`stored` returns."""
    scale = getattr(module, name + SCALE, None)
    axes = getattr(module, name).get_metadata()["axes"]
    return axes if scale is None else Int8(axes, scale.get_metadata()["axes"])


def product(
    x: Float[Array, "B T *in"], weight: Array | Int8, axes: Axes, **kwargs
) -> Float[Array, "B T *out"]:
    """:func:`jaxalope.sharding.project` by a weight of either form, cast to the dtype of ``x``.

    A scale of output channels is applied to the result: integers up to 127 are exact in bfloat16,
    and there are fewer results than weights.
    """
    num_in = weight.ndim - (len(axes) - 2)
    if not isinstance(weight, Int8) or any(s > 1 for s in weight.scale.shape[:num_in]):
        return project(x, weight.astype(x.dtype), axes, **kwargs)
    y = project(x, weight.values.astype(x.dtype), axes, **kwargs)
    scale = weight.scale.astype(jnp.float32).reshape(weight.scale.shape[num_in:])
    return (y.astype(jnp.float32) * constrain(scale, *axes[2:])).astype(y.dtype)
