"""The grouped product as ``jax.lax.ragged_dot``: the form that XLA compiles well on TPU.

What it makes of rows past the last group is not promised on every platform. A row of a result
depends on its own row only, so there it is cleared afterwards, which XLA fuses with what reads it;
sums over rows get cleared operands.
"""

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from ..precision import as_set
from .products import Products

# Ragged rows of the left operand, by groups of the right one: [M, D] with [E, D, F], and with the
# weights transposed, [M, F] with [E, D, F].
_FORWARD = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_TO_ROWS = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
# The ragged rows are summed over: [M, D] with [M, F] to [E, D, F].
_TO_WEIGHTS = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def _ragged_dot(a, b, group_sizes, dimensions, dtype):
    return jax.lax.ragged_dot_general(
        a,
        b,
        group_sizes,
        ragged_dot_dimension_numbers=dimensions,
        precision=as_set(a.dtype),
        # Of the result. Sums are float32 whatever it is.
        preferred_element_type=dtype,
    )


def _forward(x, w, group_sizes):
    return cleared(_ragged_dot(x, w, group_sizes, _FORWARD, x.dtype), group_sizes)


def _to_rows(dy, w, group_sizes):
    return cleared(_ragged_dot(dy, w, group_sizes, _TO_ROWS, dy.dtype), group_sizes)


def _to_weights(x, dy, group_sizes, dtype):
    x, dy = cleared(x, group_sizes), cleared(dy, group_sizes)
    return _ragged_dot(x, dy, group_sizes, _TO_WEIGHTS, dtype)


PRODUCTS = Products(_forward, _to_rows, _to_weights)


def cleared(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The rows, zero past the last group."""
    inside = (jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None]
    return jnp.where(inside, rows, 0)
