"""Operations on activations: ``constrain``, ``einsum``, ``project``, ``take``, ``kernel_map``, ...

Each is the plain JAX operation where no mesh is set (or inside a ``shard_map``, where arrays are
local), states the result's sharding as part of its type under Explicit axes, and is a constraint
for the compiler under Auto axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from .axes import current_rules

Axes = Sequence[str | None]


def _active_mesh() -> tuple[Any, bool] | None:
    """The mesh in force and whether its axes are Explicit; None where arrays are not sharded."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return None
    return mesh, AxisType.Explicit in mesh.axis_types


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay ``x`` out by its logical ``axes`` (one a dimension)."""
    active = _active_mesh()
    if active is None:
        return x
    mesh, explicit = active
    spec = current_rules().spec(axes, mesh.axis_names)
    if explicit:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def einsum(subscripts: str, a: jax.Array, b: jax.Array, axes: Axes, **kwargs) -> jax.Array:
    """``jnp.einsum(subscripts, a, b)`` whose result is laid out by ``axes``.

    Contractions over a sharded dimension (a gathered FSDP weight, a row-parallel projection) need
    this statement; ``kwargs`` go to ``jnp.einsum`` (``preferred_element_type``, ``precision``).
    """
    active = _active_mesh()
    if active is None:
        return jnp.einsum(subscripts, a, b, **kwargs)
    mesh, explicit = active
    spec = current_rules().spec(axes, mesh.axis_names)
    if explicit:
        return jnp.einsum(subscripts, a, b, out_sharding=spec, **kwargs)
    return jax.lax.with_sharding_constraint(jnp.einsum(subscripts, a, b, **kwargs), spec)


def project(x: jax.Array, kernel: jax.Array, axes: Axes, **kwargs) -> jax.Array:
    """``x [B, T, *in]`` by ``kernel [*in, *out]``: ``[B, T, *out]``, laid out by ``axes``.

    A product of two matrices where nothing is sharded: the gradient of one over two dimensions of
    tokens has transposes in it that cost XLA's CPU backend as much as the products themselves.
    ``kwargs`` are those of :func:`einsum`.
    """
    num_out = len(axes) - 2
    num_in = kernel.ndim - num_out
    if _active_mesh() is None:
        rows = x.reshape(math.prod(x.shape[:2]), -1)
        y = jnp.einsum("rd,du->ru", rows, kernel.reshape(rows.shape[1], -1), **kwargs)
        return y.reshape(*x.shape[:2], *kernel.shape[num_in:])
    i, o = "xyz"[:num_in], "uvw"[:num_out]
    return einsum(f"bt{i},{i}{o}->bt{o}", x, kernel, axes, **kwargs)


def take(table: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    """Rows ``table[ids]``, laid out by ``axes``. Every id must be inside the table."""
    active = _active_mesh()
    if active is None:
        return table.at[ids].get(mode="promise_in_bounds")
    mesh, explicit = active
    spec = current_rules().spec(axes, mesh.axis_names)
    if explicit:
        return table.at[ids].get(mode="promise_in_bounds", out_sharding=spec)
    return jax.lax.with_sharding_constraint(table[ids], spec)


def take_rows(x: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
    """``x`` at ``rows`` of its batch ``axis``, laid out as ``x`` is; rows may repeat."""
    index = (slice(None),) * axis + (rows,)
    active = _active_mesh()
    if active is None or not active[1]:
        return x.at[index].get(mode="promise_in_bounds")
    return x.at[index].get(mode="promise_in_bounds", out_sharding=jax.typeof(x).sharding.spec)


def whole(x: jax.Array, axis: int) -> jax.Array:
    """``x`` with no device holding only a part of this ``axis``: for sums and scans along it."""
    active = _active_mesh()
    if active is None or not active[1]:
        return x
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = None
    return jax.sharding.reshard(x, PartitionSpec(*spec))


def laid_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """``x`` laid out as ``other``, an array of its shape, is."""
    active = _active_mesh()
    if active is None or not active[1]:
        return x
    return jax.sharding.reshard(x, jax.typeof(other).sharding.spec)


def repeat(x: jax.Array, times: int, axis: int) -> jax.Array:
    """Every element of an ``axis`` so many times in a row, laid out as ``x`` is."""
    active = _active_mesh()
    if active is None or not active[1]:
        return jnp.repeat(x, times, axis)
    return jnp.repeat(x, times, axis, out_sharding=jax.typeof(x).sharding.spec)


def kernel_map(
    fn: Callable[..., Any], in_axes: Sequence[Axes], out_axes: Axes | tuple[Axes, ...]
) -> Callable[..., Any]:
    """``fn`` run once a device on its local block of every argument.

    The one door through which Pallas calls, ``ragged_dot`` and custom operators meet a mesh. Mesh
    axes that no argument is split over hold copies; ``fn`` may use :func:`psum_over` to add partial
    results of axes it contracts.

    Args:
        fn: a function of arrays; sees local blocks.
        in_axes: logical axes of each argument; of one that is a pytree (a weight with its scale),
            the same pytree with the axes of each array.
        out_axes: logical axes of the result, or a tuple with those of each result.
    """
    active = _active_mesh()
    if active is None:
        return fn
    mesh, explicit = active
    rules = current_rules()

    def spec(axes: Any) -> Any:
        def one(names: Axes) -> PartitionSpec:
            return rules.spec(names, mesh.axis_names)

        return jax.tree.map(one, axes, is_leaf=lambda x: isinstance(x, tuple | list))

    in_specs = tuple(spec(axes) for axes in in_axes)
    several = bool(out_axes) and not isinstance(out_axes[0], str | None)
    out_specs = tuple(spec(axes) for axes in out_axes) if several else spec(out_axes)
    mapped = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def call(*args):
        if explicit:
            args = [jax.sharding.reshard(x, s) for x, s in zip(args, in_specs, strict=True)]
        return mapped(*args)

    return call


def mesh_axes_of(axis: str) -> tuple[str, ...]:
    """The axes of the mesh in force over which a logical axis is split; () without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    (entry,) = current_rules().spec((axis,), mesh.axis_names)
    return () if entry is None else ((entry,) if isinstance(entry, str) else tuple(entry))


def psum_over(x: jax.Array, axis: str) -> jax.Array:
    """Inside :func:`kernel_map`: the sum of ``x`` over the devices that split a logical axis."""
    names = mesh_axes_of(axis)
    return jax.lax.psum(x, names) if names else x
