"""The grouped product as ragged products: the form that XLA compiles well on TPU.

Which ragged product is an argument: XLA's own, or that of a library with the same interface. What
`ragged_dot` makes of rows past the last group is not promised on every platform. A row of a result
depends on its own row only, so there it is cleared afterwards, which XLA fuses with what reads it;
sums over rows get cleared operands.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from .products import Products, accumulator

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


def ragged_products(ragged_dot_general: Callable[..., jax.Array]) -> Products:
    """The products by a function with the interface of ``jax.lax.ragged_dot_general``."""

    def run(a, b, group_sizes, dimensions):
        return ragged_dot_general(
            a,
            b,
            group_sizes,
            ragged_dot_dimension_numbers=dimensions,
            preferred_element_type=accumulator(a),
        )

    def by_rows(dimensions):
        def product(x, w, group_sizes):
            y = run(x, w, group_sizes, dimensions)
            return _cleared(y, group_sizes).astype(x.dtype)

        return product

    def to_weights(x, dy, group_sizes, dtype):
        x, dy = _cleared(x, group_sizes), _cleared(dy, group_sizes)
        return run(x, dy, group_sizes, _TO_WEIGHTS).astype(dtype)

    return Products(by_rows(_FORWARD), by_rows(_TO_ROWS), to_weights)


def _cleared(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The rows, zero past the last group."""
    inside = (jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None]
    return jnp.where(inside, rows, 0)
