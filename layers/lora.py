"""A low-rank adapter beside a linear map (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..sharding import project


class LoRA(nnx.Module):
    """``alpha / rank * (x @ a) @ b``, added to a map ``[*in] -> [*out]``.

    ``a`` is drawn from U(±1/sqrt(fan-in)), as PEFT's, and ``b`` is zero: a fresh adapter adds
    nothing.

    Args:
        shape: of the map's kernel, ``[*stacked, *in, *out]``.
        axes: logical, of ``[*in, *out]``.
        num_out: how many of them are produced.
        rank: columns of ``a`` and rows of ``b``.
        alpha: the adapter is scaled by ``alpha / rank``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        num_out: int,
        *,
        rank: int,
        alpha: float,
        rngs: nnx.Rngs,
    ):
        num_in = len(axes) - num_out
        stacked = shape[: len(shape) - len(axes)]
        inner, outer = shape[len(stacked) : len(shape) - num_out], shape[len(shape) - num_out :]
        bound = 1 / math.sqrt(math.prod(inner))
        a = (*stacked, *inner, rank)
        self.a = nnx.Param(
            jax.random.uniform(rngs.params(), a, jnp.float32, -bound, bound),
            axes=(*axes[:num_in], None),
        )
        self.b = nnx.Param(
            jnp.zeros((*stacked, rank, *outer), jnp.float32), axes=(None, *axes[num_in:])
        )
        self.scale = alpha / rank

    def __call__(
        self, x: Float[Array, "B T *in"], axes: tuple[str | None, ...]
    ) -> Float[Array, "B T *out"]:
        """What is added to the map's result, laid out by ``axes`` as it is."""
        narrow = project(x, self.a[...].astype(x.dtype), (*axes[:2], None))
        return project(narrow, self.b[...].astype(x.dtype), axes) * self.scale

    def delta(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """What is added to the map's kernel, ``[*stacked, *in, *out]``."""

        def one(a, b):
            return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)

        for _ in range(self.a[...].ndim - len(self.a.get_metadata()["axes"])):
            one = jax.vmap(one)
        return (one(self.a[...], self.b[...]) * self.scale).astype(dtype)
