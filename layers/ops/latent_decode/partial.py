"""Softmax over a part of the slots, and how parts become a whole.

A part is `(o, lse)`: the average of values over its slots, and the log of the sum of `exp(score)`
that it is weighted by. A part without a visible slot is `(0, HIDDEN)`. Finite, because inf - inf is
not a number.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

HIDDEN = -1e30


def part(total: Array, top: Array, acc: Array) -> tuple[Array, Array]:
    """The part that an online softmax ends with.

    Args:
        total: sum of `exp(score - top)`, [..., 1] float32.
        top: the highest score, HIDDEN where no slot was visible, [..., 1] float32.
        acc: values in these weights, [..., V] float32.
    """
    some = top > HIDDEN / 2
    # Where all was hidden the weights are meaningless, and their sum may be 0.
    total = jnp.where(some, total, 1.0)
    return jnp.where(some, acc / total, 0.0), jnp.where(some, top + jnp.log(total), HIDDEN)


def combine(
    o: Float[Array, "P *rows V"], lse: Float[Array, "P *rows"]
) -> tuple[Float[Array, "*rows V"], Float[Array, "*rows"]]:
    """The part that P parts of different slots are together; all float32."""
    if o.shape[0] == 1:
        return o[0], lse[0]
    top = jnp.max(lse, axis=0)
    weights = jnp.exp(lse - top)
    total = jnp.sum(weights, axis=0)
    o = jnp.sum(o * weights[..., None], axis=0) / total[..., None]
    return o, top + jnp.log(total)
