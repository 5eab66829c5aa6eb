"""The grouped product by Pallas kernels for NVIDIA GPUs (Triton lowering).

XLA has no grouped product on a GPU: it makes `ragged_dot` one dense product for each group, over
all rows, E times the work and E copies of the rows. Here a program of the grid multiplies a tile of
the rows of one group: the tiles of a group start where the group does, and what a last one holds
of the next group is masked. The list of tiles is made from the sizes of the groups, and is as long
as it can get: M / tile + E + 1. The rows past the last group are a group more, of zeros.

The gradient of the weights is one program for each tile of a weight, over the rows of its group.

The first axis of a grid runs fastest on a GPU: programs that run together have the same rows, all
columns of them, or the same group, all tiles of its weight. So rows are read from HBM about once,
and the rest from L2, which holds what a few tiles of rows share but not all rows of a batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .. import tuning
from ..optional import check_triton
from ..optional import triton as plgpu
from ..pallas_call import pallas_call
from ..platform import check_floats, only_on
from ..precision import full
from .products import Products
from .shapes import shape_class

_on_gpu = only_on("cuda", "pallas_gpu", "grouped_matmul")
_MIN_SIDE = 16  # smallest side of a tensor core's product


class Plan(NamedTuple):
    """Sides of tiles, in rows, columns of the result and terms of a sum; how a program runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    interpret: bool


def takes(x: jax.Array) -> bool:
    """Whether the kernels can be lowered by this JAX, for rows of this dtype."""
    return plgpu is not None and x.dtype in (jnp.float32, jnp.bfloat16)


def _plan(x, w, interpret: bool) -> Plan:
    """For a product of these rows and weights; `w` may stand for its gradient."""
    groups = w.shape[0]
    if x.dtype == jnp.float32:
        # Exact float32 products run without tensor cores; larger tiles would leave the registers.
        return Plan(32, 32, _MIN_SIDE, 4, 2, interpret)
    tuned = tuning.chosen("grouped_matmul", shape_class(groups, w.shape))
    # A group of few rows would mostly multiply zeros in a tall tile.
    mean = pl.next_power_of_2(max(1, x.shape[0] // groups))
    rows = min(max(mean, _MIN_SIDE), tuned.get("row_tile", 128))
    return Plan(
        rows=rows,
        columns=tuned.get("column_tile", 128),
        depth=tuned.get("depth_tile", 64),
        warps=tuned.get("warps", 8 if rows >= 128 else 4),
        stages=tuned.get("stages", 3),
        interpret=interpret,
    )


def _tiles(group_sizes: jax.Array, num_rows: int, side: int) -> jax.Array:
    """The tiles of every group: ``[3, tiles]``, the group of one, its first row, its group's end.

    The group of tiles past the last one is E, as is that of the rows past the last group.
    """
    groups = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    rest = num_rows - jnp.sum(sizes, keepdims=True, dtype=jnp.int32)
    sizes = jnp.concatenate([sizes, rest])
    starts = jnp.cumsum(sizes) - sizes
    counts = jax.lax.div(sizes + (side - 1), jnp.int32(side))
    ends = jnp.cumsum(counts)
    tile = jnp.arange(num_rows // side + groups + 1, dtype=jnp.int32)
    group = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    own = jnp.minimum(group, groups)
    first = starts[own] + (tile - (ends[own] - counts[own])) * side
    # Without a group, a tile has no rows.
    end = jnp.where(group <= groups, starts[own] + sizes[own], 0)
    return jnp.stack([own, first, end])


def _rows_kernel(plan: Plan, turned: bool, tiles, x, w, y):
    """One tile of ``x @ w[group]``, or of ``x @ w[group].T`` where `turned`."""
    tile, side = pl.program_id(1), pl.program_id(0) * plan.columns
    group, first, end = (tiles[i, tile] for i in range(3))
    depth, width = x.shape[1], y.shape[1]
    rows = pl.ds(first, plan.rows)
    mine = ((first + jnp.arange(plan.rows)) < end)[:, None]
    columns, inside = _span(side, plan.columns, width)

    def add(step, acc):
        terms, there = _span(step * plan.depth, plan.depth, depth)
        a = _load(x.at[rows, terms], mine, there)
        if turned:
            b = _load(w.at[group, columns, terms], _upright(inside), there)
        else:
            b = _load(w.at[group, terms, columns], _upright(there), inside)
        return acc + _dot(a, b, trans_b=turned)

    all_steps = jnp.int32(pl.cdiv(depth, plan.depth))
    steps = jnp.where(group < w.shape[0], all_steps, jnp.int32(0))
    acc = jnp.zeros((plan.rows, plan.columns), jnp.float32)
    acc = jax.lax.fori_loop(jnp.int32(0), steps, add, acc)
    _store(y.at[rows, columns], acc, mine, inside)


def _weights_kernel(plan: Plan, bounds, x, dy, dw):
    """One tile of ``x[rows of the group].T @ dy[rows of the group]``."""
    group = pl.program_id(2)
    first, end = bounds[0, group], bounds[1, group]
    features, inside = _span(pl.program_id(0) * plan.rows, plan.rows, x.shape[1])
    columns, within = _span(pl.program_id(1) * plan.columns, plan.columns, dy.shape[1])

    def add(step, acc):
        start = first + step * plan.depth
        rows, mine = pl.ds(start, plan.depth), ((start + jnp.arange(plan.depth)) < end)[:, None]
        a, b = _load(x.at[rows, features], mine, inside), _load(dy.at[rows, columns], mine, within)
        return acc + _dot(a, b, trans_a=True)

    steps = jax.lax.div(end - first + (plan.depth - 1), jnp.int32(plan.depth))
    acc = jnp.zeros((plan.rows, plan.columns), jnp.float32)
    acc = jax.lax.fori_loop(jnp.int32(0), steps, add, acc)
    _store(dw.at[group, features, columns], acc, _upright(inside), within)


def _span(start, side: int, size: int):
    """Part of an axis, and which of it is there: ``[1, side]``; None where all of it is."""
    inside = None if size % side == 0 else ((start + jnp.arange(side)) < size)[None, :]
    return pl.ds(jnp.asarray(start, jnp.int32), side), inside


def _upright(mask):
    return None if mask is None else mask.reshape(-1, 1)


def _both(one, other):
    return other if one is None else one if other is None else one & other


def _load(ref, one, other):
    mask = _both(one, other)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0.0)


def _store(ref, acc, one, other):
    plgpu.store(ref, acc.astype(ref.dtype), mask=_both(one, other))


def _dot(x, y, **turned):
    return plgpu.dot(x, y, precision=full(x.dtype), **turned)


def _check(x):
    check_triton("pallas_gpu")
    check_floats("pallas_gpu", x=x)


def _call(plan: Plan, kernel, grid, out, name, *arrays):
    return pallas_call(
        kernel,
        grid=grid,
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=plan.interpret,
        name=name,
    )(*arrays)


def _to_rows(x, w, group_sizes, *, turned: bool, interpret: bool):
    _check(x)
    plan, width = _plan(x, w, interpret), w.shape[1 if turned else 2]
    tiles = _tiles(group_sizes, x.shape[0], plan.rows)
    return _call(
        plan,
        functools.partial(_rows_kernel, plan, turned),
        (pl.cdiv(width, plan.columns), tiles.shape[1]),
        jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
        "grouped_matmul_to_rows" if turned else "grouped_matmul",
        tiles,
        x if interpret else _on_gpu(x),
        w,
    )


def _to_weights(x, dy, group_sizes, dtype, *, interpret: bool):
    _check(x)
    shape = (group_sizes.shape[0], x.shape[1], dy.shape[1])
    out = jax.ShapeDtypeStruct(shape, dtype)
    plan = _plan(x, out, interpret)
    # Its tiles are of a weight: none of its sides is a number of rows.
    plan = plan._replace(rows=min(plan.columns, max(_MIN_SIDE, pl.next_power_of_2(shape[1]))))
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    return _call(
        plan,
        functools.partial(_weights_kernel, plan),
        (pl.cdiv(shape[1], plan.rows), pl.cdiv(shape[2], plan.columns), shape[0]),
        out,
        "grouped_matmul_to_weights",
        jnp.stack([ends - group_sizes.astype(jnp.int32), ends]),
        x if interpret else _on_gpu(x),
        dy,
    )


def products(*, interpret: bool = False) -> Products:
    """The products as kernels; `interpret` runs them on any platform, slowly, for tests."""
    return Products(
        functools.partial(_to_rows, turned=False, interpret=interpret),
        functools.partial(_to_rows, turned=True, interpret=interpret),
        functools.partial(_to_weights, interpret=interpret),
    )
