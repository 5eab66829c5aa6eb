"""Muon in Moonlight's form (arXiv 2502.16982, section 2): momentum, orthogonalised, AdamW-sized.

Why not ``optax.contrib.muon``: its momentum is a bias-corrected average, which weighs the newest
gradient about twice as much in the first steps as the published accumulator does; and it
orthogonalises one tensor at a time through reshapes over sharded dimensions, which Explicit meshes
refuse.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ..sharding import current_rules
from .layout import place

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan 2024; Moonlight's table of hyperparameters
_HEADS = ("heads", "kv_heads")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How a parameter is read as a batch of matrices: its leading dims, rows, columns, in order.

    Attributes:
        axes: the logical axes of the parameter.
        batch: how many leading dimensions count matrices (stacked layers, experts).
        rows: how many of the following ones make up the rows; the rest are the columns.
    """

    axes: tuple[str | None, ...]
    batch: int
    rows: int

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``(*batch, rows, columns)`` of a parameter of this shape."""
        split = self.batch + self.rows
        rows, columns = math.prod(shape[self.batch : split]), math.prod(shape[split:])
        return (*shape[: self.batch], rows, columns)


def as_matrix(axes: Sequence[str | None]) -> Matrix | None:
    """The matrix that a kernel with these logical axes is; None where it is not one.

    ``layers`` counts matrices, and so do ``experts`` that lead two further dimensions. Heads and
    the dimension after them are one side: ``[embed, heads, head_dim]`` is D x HK, ``[heads,
    head_dim, embed]`` is HK x D.
    """
    axes = tuple(axes)
    batch = 0
    while axes[batch : batch + 1] == ("layers",):
        batch += 1
    if axes[batch : batch + 1] == ("experts",) and len(axes) - batch > 2:
        batch += 1
    sides: list[int] = []
    rest = axes[batch:]
    while rest:
        side = 2 if rest[0] in _HEADS and rest[1:2] == ("head_dim",) else 1
        sides.append(side)
        rest = rest[side:]
    return Matrix(axes, batch, sides[0]) if len(sides) == 2 else None


class MuonState(NamedTuple):
    """``momentum``: float32, one a matrix parameter, shaped and sharded like it."""

    momentum: dict[str, Array]


def scale_by_muon(
    matrices: Mapping[str, Matrix], momentum: float = 0.95, steps: int = 5, rms: float = 0.2
) -> optax.GradientTransformation:
    """Flat gradients into ``rms * sqrt(max(rows, columns)) * O``, with ``O`` orthogonal.

    The accumulator is ``M = momentum * M + g``, and ``O`` comes from its Nesterov look-ahead
    ``momentum * M + g``. Learning rate and weight decay are the caller's.
    """

    def init(params):
        return MuonState({n: jnp.zeros_like(p, jnp.float32) for n, p in params.items()})

    def update(grads, state, params=None):
        del params
        grads = {n: g.astype(jnp.float32) for n, g in grads.items()}
        moments = {n: momentum * state.momentum[n] + g for n, g in grads.items()}
        ahead = {n: momentum * moments[n] + g for n, g in grads.items()}
        return _updates(ahead, matrices, steps, rms), MuonState(moments)

    return optax.GradientTransformation(init, update)


def orthogonalise(x: Float[Array, "*batch R C"], steps: int) -> Float[Array, "*batch R C"]:
    """Nearly orthogonal matrices (singular values in about [0.7, 1.2]) by Newton-Schulz steps.

    ``R <= C`` is the least work. A matrix of zeros (an expert without a single token) stays one.
    """
    a, b, c = _COEFFICIENTS
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True)
    x = (x / jnp.maximum(jnp.sqrt(square), 1e-30)).astype(x.dtype)

    def step(_, x):
        gram = jnp.einsum("...ij,...kj->...ik", x, x)
        return a * x + (b * gram + c * gram @ gram) @ x

    # A loop rather than copies: a model has some ten shapes of matrices to compile.
    return jax.lax.fori_loop(0, steps, step, x)


def _updates(
    ahead: dict[str, Array], matrices: Mapping[str, Matrix], steps: int, rms: float
) -> dict[str, Array]:
    """Scaled orthogonal matrices, those of one shape together; float32, sharded as they came."""

    def run(solve, dtype):
        def together(ahead):
            stacks = collections.defaultdict(dict)
            routes, turned = {}, {}
            for name, x in ahead.items():
                matrix, routes[name] = matrices[name], _route(matrices[name], x.shape)
                x = x.astype(dtype)
                for spec in routes[name][1:]:
                    x = place(x, spec)
                x = x.reshape(matrix.shape(x.shape))
                # The iteration commutes with transposition, and the smaller Gram matrix is cheaper.
                turned[name] = x.shape[-2] > x.shape[-1]
                x = jnp.swapaxes(x, -2, -1) if turned[name] else x
                where = routes[name][-1][: matrix.batch] if routes[name] else ()
                # A batch that lies on one device joins all others of its matrices' shape; one that
                # is sharded, those which are laid out alike.
                x = x[None] if any(where) else x.reshape(-1, *x.shape[-2:])
                stacks[x.shape[1:], where if any(where) else ()][name] = x
            out = {}
            for stack in stacks.values():
                done = solve(jnp.concatenate(list(stack.values())))
                done = rms * math.sqrt(max(done.shape[-2:])) * done.astype(jnp.float32)
                start = 0
                for name, x in stack.items():
                    u = done[start : start + len(x)]
                    start += len(x)
                    matrix, shape = matrices[name], ahead[name].shape
                    *batch, rows, columns = matrix.shape(shape)
                    u = u.reshape(*batch, *((columns, rows) if turned[name] else (rows, columns)))
                    u = (jnp.swapaxes(u, -2, -1) if turned[name] else u).reshape(shape)
                    for spec in reversed(routes[name][:-1]):
                        u = place(u, spec)
                    out[name] = u
            return out

        return together

    def batched(x):
        return orthogonalise(x, steps)

    def one_by_one(x):
        return jax.lax.map(batched, x)

    # The iteration tolerates bfloat16, which accelerators multiply fast. A CPU does not, and it
    # multiplies matrices faster one by one than as a batch.
    return jax.lax.platform_dependent(
        ahead, cpu=run(one_by_one, jnp.float32), default=run(batched, jnp.bfloat16)
    )


def _route(matrix: Matrix, shape: Sequence[int]) -> list[PartitionSpec]:
    """Layouts from the parameter's own to one that keeps each matrix whole; [] without a mesh.

    A mesh axis that splits rows or columns goes over to a batch dimension that it divides, so that
    devices share the matrices out (one all-to-all an axis, each in its own layout: the partitioner
    does not see a move of several at once). An axis that divides none is gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return []
    home = current_rules().param_spec(matrix.axes, mesh.axis_names)
    spec = [() if e is None else ((e,) if isinstance(e, str) else tuple(e)) for e in home]
    route = [home]
    for dim in reversed(range(matrix.batch, len(shape))):
        while spec[dim]:
            spec[dim], axis = spec[dim][:-1], spec[dim][-1]
            if mesh.shape[axis] > 1:
                for b in reversed(range(matrix.batch)):
                    parts = math.prod(mesh.shape[a] for a in spec[b])
                    if shape[b] % (parts * mesh.shape[axis]) == 0:
                        spec[b] = (*spec[b], axis)
                        break
            route.append(PartitionSpec(*(e or None for e in spec)))
    return route
