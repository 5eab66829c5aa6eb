"""The grouped product as one ragged product: the form that XLA compiles well on GPU and TPU.

Which ragged product is an argument: XLA's own, or that of a library with the same interface.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Ragged:
    """The functions that an implementation has, by a product with ``ragged_dot``'s interface."""

    ragged_dot: Callable[..., jax.Array]

    def product(
        self, x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
    ) -> Float[Array, "M F"]:
        """``x[m] @ w[group of m]``, accumulated in float32; rows past the last group give zero.

        ``ragged_dot`` promises nothing about those rows on every platform, in its value or in its
        gradient, so they are cleared on both sides of it.
        """
        inside = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
        y = self.ragged_dot(
            jnp.where(inside, x, 0), w, group_sizes, preferred_element_type=_accumulator(x)
        )
        return jnp.where(inside, y, 0).astype(x.dtype)

    def product_vjp(self, x, w, group_sizes, dy):
        """The gradients of :meth:`product` in ``x`` and ``w``."""
        return jax.vjp(lambda x, w: self.product(x, w, group_sizes), x, w)[1](dy)

    def swiglu(self, x, gate, up, down, group_sizes):
        """``(y, gate product, up product)`` of every row's expert."""
        g, u = self.product(x, gate, group_sizes), self.product(x, up, group_sizes)
        return self.product(silu_times(g, u), down, group_sizes), g, u

    def swiglu_vjp(self, x, gate, up, down, group_sizes, g, u, dy):
        """The gradients of :meth:`swiglu` in ``x``, ``gate``, ``up`` and ``down``."""
        hidden, pull = jax.vjp(silu_times, g, u)
        dhidden, ddown = self.product_vjp(hidden, down, group_sizes, dy)
        dg, du = pull(dhidden)
        dx_gate, dgate = self.product_vjp(x, gate, group_sizes, dg)
        dx_up, dup = self.product_vjp(x, up, group_sizes, du)
        return dx_gate + dx_up, dgate, dup, ddown


def silu_times(g: Float[Array, "*B F"], u: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """``silu(g) * u``, evaluated in float32."""
    wide = _accumulator(g)
    return (jax.nn.silu(g.astype(wide)) * u.astype(wide)).astype(g.dtype)


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
