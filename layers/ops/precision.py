"""What products of 16-bit factors are asked for: no more digits than those factors have.

They are exact as they are, and that has to be said. `None` would mean whatever
`jax_default_matmul_precision` asks for, and Mosaic compiles no 16-bit product that asks for more.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def full(dtype: DTypeLike) -> jax.lax.Precision:
    """All digits of factors of this dtype."""
    return as_set(dtype) or jax.lax.Precision.HIGHEST


def as_set(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Of float32 factors, the digits that JAX is set to."""
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize < 4 else None
