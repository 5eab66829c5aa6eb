"""Where the arrays of a training state and of a batch lie on the mesh in force."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from ..sharding import current_rules


def place(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Lay ``x`` out by ``spec``: part of its type under Explicit axes, a constraint under Auto."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def place_param(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Lay ``x`` out as a parameter with these logical ``axes`` is stored."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else place(x, current_rules().param_spec(axes, mesh.axis_names))


def replicate(x: jax.Array) -> jax.Array:
    """A copy of ``x`` on every device."""
    return place(x, PartitionSpec(*(None,) * x.ndim))


def split_rows(x: jax.Array, parts: int, axis: int = 0) -> jax.Array:
    """``x`` in ``parts`` along a sharded dimension, without moving data: a new leading dimension.

    Part ``i`` has the indices ``i, i + parts, ...``, so that every device keeps a share of each; a
    part of neighbours would lie on a few devices.
    """
    shape = x.shape
    x = x.reshape(*shape[:axis], shape[axis] // parts, parts, *shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 0)


def ways(*logical_axes: str) -> int:
    """Over how many devices of the mesh in force these activation axes are split together."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    split = set()
    for entry in current_rules().spec(logical_axes, mesh.axis_names):
        split |= {entry} if isinstance(entry, str) else set(entry or ())
    return math.prod(mesh.shape[axis] for axis in split)
