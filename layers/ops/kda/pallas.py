"""What the Pallas kernels of KDA share, whatever chip they are for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ....errors import InputError
from ...segments import segment_index
from .. import platform
from ..platform import REMEDY, check_floats
from ..precision import full

only_on = functools.partial(platform.only_on, operator="kda")
# Widest head that is compiled for in tests; the state of a head has to stay on the chip.
MAX_WIDTH = 256
_CONTRACT = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


def dot(x: Array, y: Array, how: str, dtype=jnp.float32, precision=None) -> Array:
    """x y ("nn"), x y^T ("nt") or x^T y ("tn"), summed in float32.

    `precision` is that of float32 factors: all of it, unless said otherwise.
    """
    left, right = _CONTRACT[how]
    return jax.lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (((left,), (right,)), ((), ())),
        precision=precision if dtype == jnp.float32 and precision else full(dtype),
        preferred_element_type=jnp.float32,
    )


def check(implementation: str, q: Array, k: Array, v: Array, g: Array) -> None:
    """Raises InputError for a dtype or a width that no kernel takes."""
    check_floats(implementation, q=q, k=k, v=v)
    if g.dtype != jnp.float32:
        raise InputError(
            f'g has dtype {g.dtype}; implementation="{implementation}" takes float32: {REMEDY}'
        )
    if max(q.shape[-1], v.shape[-1]) > MAX_WIDTH:
        raise InputError(
            f"q {q.shape} and v {v.shape} have heads wider than {MAX_WIDTH}, the limit of "
            f'implementation="{implementation}": {REMEDY}'
        )


def widen(x: Array, *widths: int) -> Array:
    """Pads the last axes with zeros to these widths."""
    extra = [width - size for width, size in zip(widths, x.shape[-len(widths) :], strict=True)]
    if not any(extra):
        return x
    return jnp.pad(x, ((0, 0),) * (x.ndim - len(widths)) + tuple((0, count) for count in extra))


def group_sum(x: Float[Array, "B T Hv padded"], like: Float[Array, "B T H K"]) -> Array:
    """Adds up the gradients of the value heads that read one q/k head; padded channels go."""
    batch, length, heads, width = like.shape
    x = x.reshape(batch, length, heads, -1, x.shape[-1])[..., :width]
    return jnp.sum(x, axis=3).astype(like.dtype) if x.shape[3] > 1 else x[..., 0, :]


def segment_marks(
    segment_ids: Int[Array, "B T"], chunk: int, axis: int = 2
) -> Float[Array, "B N _ _"]:
    """Each token's segment number; is it the segment that entered its chunk; that leaves it.

    The three lie along `axis`: 2, or 3 for "B N C 3".
    """
    number = segment_index(segment_ids).reshape(segment_ids.shape[0], -1, chunk)
    last = number[..., -1:]
    # A row starts inside its segment 0.
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.stack([number, number == before, number == last], axis=axis).astype(jnp.float32)
