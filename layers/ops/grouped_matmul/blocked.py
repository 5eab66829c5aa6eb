"""The grouped product for CPU, where ``ragged_dot`` costs as much as every expert on every row.

Two passes cover the rows of every group, and only they need to know where a group lies:

1. one product batched over the groups, for as many first rows of each as a balanced load seldom
   exceeds: its mean, ``M / E``, and two standard deviations; it has the speed of one large matmul;
2. a loop over blocks of the rows that are left, with as many turns as there are such blocks: none
   when the load is balanced, and never more than ``M / BLOCK + E``, however skewed it is.

The number of rows computed thus stays near twice the number given, or below, but for a few rows a
group. Loops of a data-dependent length have no reverse mode, so the gradients are a second use of
the same two passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from .. import tuning
from .products import silu_times
from .shapes import shape_class

BLOCK = 64  # rows a turn: fewer waste time in small products, more in rows that are not there

Arrays = tuple[jax.Array, ...]


def map_groups(
    fn: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]],
    rows: Arrays,
    weights: Arrays,
    group_sizes: jax.Array,
) -> tuple[Arrays, Arrays]:
    """``fn(rows of one group, weights of that group) -> (row results, group results)``, everywhere.

    ``fn`` sees blocks of a fixed number of rows; those that are not the group's are zero, and must
    give zero row results and add nothing to the group results.

    Args:
        fn: the function of one block.
        rows: arrays ``[M, ...]`` whose rows are sorted by group.
        weights: arrays ``[E, ...]``.
        group_sizes: ``[E]``; rows past the last group give zero.

    Returns:
        Row results, each ``[M, ...]``, and group results summed over blocks, each ``[E, ...]``.
    """
    num_rows, num_groups = rows[0].shape[0], group_sizes.shape[0]
    mean = -(-num_rows // num_groups)
    first = min(num_rows, mean + math.ceil(2 * math.sqrt(mean)))
    tuned = tuning.chosen("grouped_matmul", shape_class(num_groups, weights[0].shape))
    block = min(tuned.get("block", BLOCK), num_rows)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes

    # First pass: row `rank` of group `e` is row `starts[e] + rank`.
    rank = jnp.arange(first)
    at = jnp.minimum(starts[:, None] + rank, num_rows - 1)
    mine = (rank < group_sizes[:, None])[:, :, None]
    results, sums = jax.vmap(fn)(tuple(jnp.where(mine, r[at], 0) for r in rows), weights)
    row = jnp.arange(num_rows)
    group = jnp.searchsorted(ends, row, side="right", method="compare_all")
    rank = row - starts.at[group].get(mode="clip")
    done = ((group < num_groups) & (rank < first))[:, None]
    source = jnp.clip(group * first + rank, 0, num_groups * first - 1)
    results = tuple(jnp.where(done, r.reshape(num_groups * first, -1)[source], 0) for r in results)

    # Second pass: the rows of a group that the first has not covered, a block at a time.
    def rest_of(e, carry):
        def turn(w, carry):
            begin, results, sums = carry
            at = jnp.minimum(begin, num_rows - block)  # the last block may not overrun the array
            row = at + jnp.arange(block)
            mine = ((row >= begin) & (row < ends[e]))[:, None]

            def cut(array):
                return jax.lax.dynamic_slice_in_dim(array, at, block)

            new, more = fn(tuple(jnp.where(mine, cut(r), 0) for r in rows), w)
            results = tuple(
                jax.lax.dynamic_update_slice_in_dim(r, jnp.where(mine, n, cut(r)), at, 0)
                for r, n in zip(results, new, strict=True)
            )
            return begin + block, results, tuple(a + b for a, b in zip(sums, more, strict=True))

        def rest(carry):
            results, sums = carry
            w, own = (
                tuple(jax.lax.dynamic_index_in_dim(a, e, 0, keepdims=False) for a in arrays)
                for arrays in (weights, sums)
            )
            _, results, own = jax.lax.while_loop(
                lambda c: c[0] < ends[e], partial(turn, w), (starts[e] + first, results, own)
            )
            return results, tuple(
                jax.lax.dynamic_update_index_in_dim(a, b, e, 0)
                for a, b in zip(sums, own, strict=True)
            )

        return jax.lax.cond(group_sizes[e] > first, rest, lambda carry: carry, carry)

    return jax.lax.cond(
        jnp.any(group_sizes > first),
        lambda carry: jax.lax.fori_loop(0, num_groups, rest_of, carry),
        lambda carry: carry,
        (results, sums),
    )


def product(x, w, group_sizes):
    """``x[m] @ w[group of m]``."""

    def fn(rows, weights):
        return (_dot(rows[0], weights[0], x.dtype),), ()

    return map_groups(fn, (x,), (w,), group_sizes)[0][0]


def product_vjp(x, w, group_sizes, dy, *, weight_dtype):
    """The gradients of :func:`product` in ``x`` and ``w``, this one in ``weight_dtype``."""

    def fn(rows, weights):
        x, dy = rows
        return (_dot(dy, weights[0].T, x.dtype),), (_dot(x.T, dy),)

    (dx,), (dw,) = map_groups(fn, (x, dy), (w,), group_sizes)
    return dx, dw.astype(weight_dtype)


def swiglu(x, gate, up, down, group_sizes):
    """``(y, gate product, up product)`` of every row's expert, in one visit of the rows."""

    def fn(rows, weights):
        gate, up, down = weights
        g, u = _dot(rows[0], gate, x.dtype), _dot(rows[0], up, x.dtype)
        return (_dot(silu_times(g, u), down, x.dtype), g, u), ()

    return map_groups(fn, (x,), (gate, up, down), group_sizes)[0]


def swiglu_vjp(x, gate, up, down, group_sizes, g, u, dy, *, weight_dtype):
    """The gradients of :func:`swiglu` in ``x``, ``gate``, ``up`` and ``down``."""

    def fn(rows, weights):
        x, g, u, dy = rows
        gate, up, down = weights
        hidden, pull = jax.vjp(silu_times, g, u)
        dg, du = pull(_dot(dy, down.T, x.dtype))
        dx = _dot(dg, gate.T) + _dot(du, up.T)
        return (dx.astype(x.dtype),), (_dot(x.T, dg), _dot(x.T, du), _dot(hidden.T, dy))

    (dx,), dw = map_groups(fn, (x, g, u, dy), (gate, up, down), group_sizes)
    return dx, *(d.astype(weight_dtype) for d in dw)


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """``a @ b`` accumulated in float32, or wider, and cast to ``dtype`` (left so if None)."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    y = jnp.matmul(a, b, preferred_element_type=wide)
    return y if dtype is None else y.astype(dtype)
