"""What an implementation of the grouped product has to give, and what follows from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Product = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Products:
    """Three products over rows ``[M, .]`` that are sorted by group, and the SwiGLU of them.

    All arrays are of one dtype, that of the rows that result; sums are float32. Rows past the last
    group may hold anything; those of a result are zero.

    Attributes:
        forward: ``(x [M, D], w [E, D, F], sizes) -> [M, F]``.
        to_rows: ``(dy [M, F], w [E, D, F], sizes) -> [M, D]``, with transposed weights.
        to_weights: ``(x [M, D], dy [M, F], sizes, dtype) -> [E, D, F]``, sums over the rows of a
            group, in that dtype.
    """

    forward: Product
    to_rows: Product
    to_weights: Product

    def product(self, x, w, group_sizes):
        """``x[m] @ w[group of m]``."""
        return self.forward(x, w, group_sizes)

    def product_vjp(self, x, w, group_sizes, dy, *, weight_dtype):
        """The gradients of :meth:`product` in ``x`` and ``w``, this one in ``weight_dtype``."""
        dw = self.to_weights(x, dy, group_sizes, weight_dtype)
        return self.to_rows(dy, w, group_sizes), dw

    def swiglu(self, x, gate, up, down, group_sizes):
        """``(y, gate product, up product)`` of every row's expert."""
        g, u = self.forward(x, gate, group_sizes), self.forward(x, up, group_sizes)
        return self.forward(silu_times(g, u), down, group_sizes), g, u

    def swiglu_vjp(self, x, gate, up, down, group_sizes, g, u, dy, *, weight_dtype):
        """The gradients of :meth:`swiglu` in ``x``, ``gate``, ``up`` and ``down``."""
        vjp = functools.partial(self.product_vjp, weight_dtype=weight_dtype)
        hidden, pull = jax.vjp(silu_times, g, u)
        dhidden, ddown = vjp(hidden, down, group_sizes, dy)
        dg, du = pull(dhidden)
        dx_gate, dgate = vjp(x, gate, group_sizes, dg)
        dx_up, dup = vjp(x, up, group_sizes, du)
        return dx_gate + dx_up, dgate, dup, ddown


def silu_times(g: jax.Array, u: jax.Array) -> jax.Array:
    """``silu(g) * u``, evaluated in float32."""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return (jax.nn.silu(g.astype(wide)) * u.astype(wide)).astype(g.dtype)
