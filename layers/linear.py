"""Linear maps and embeddings: float32 master weights, cast to the activation's dtype at use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..sharding import constrain, einsum, take
from .int8 import SCALE, product, stored


def normal(key: jax.Array, shape: Sequence[int], stddev: float) -> Float[Array, "..."]:
    """A float32 sample of N(0, stddev²)."""
    return stddev * jax.random.normal(key, tuple(shape), jnp.float32)


class Linear(nnx.Module):
    """``y = x @ kernel + bias`` over the trailing dimensions.

    Dimensions that mean something stay apart: a query projection has the kernel
    ``[embed, heads, head_dim]`` and maps ``[B, T, D]`` to ``[B, T, N, K]``.

    Args:
        in_axes: ``{logical axis: size}`` of the contracted dimensions; None is no axis.
        out_axes: ``{logical axis: size}`` of the produced ones.
        use_bias: add a bias of shape ``out_axes``, which starts at zero; without it there is no
            attribute ``bias``.
        stddev: of the initial weights.
    """

    def __init__(
        self,
        in_axes: dict[str | None, int],
        out_axes: dict[str | None, int],
        *,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        stddev: float = 0.02,
    ):
        shape = (*in_axes.values(), *out_axes.values())
        self.kernel = nnx.Param(
            normal(rngs.params(), shape, stddev), axes=(*in_axes.keys(), *out_axes.keys())
        )
        if use_bias:
            zeros = jnp.zeros(tuple(out_axes.values()), jnp.float32)
            self.bias = nnx.Param(zeros, axes=tuple(out_axes))
        self.out_axes = tuple(out_axes)

    def __call__(self, x: Float[Array, "B T *in"], **kwargs) -> Float[Array, "B T *out"]:
        """Apply the map; the result has the dtype of ``x``.

        ``kwargs`` go to the product (``preferred_element_type``, ``precision``).
        """
        axes = ("batch", "seq", *self.out_axes)
        y = product(x, stored(self, "kernel"), axes, **kwargs)
        if hasattr(self, "lora"):
            y = y + self.lora(x, axes)
        if not hasattr(self, "bias"):
            return y
        return y + constrain(self.bias[...].astype(x.dtype), *self.out_axes)

    def plain_kernel(self) -> Float[Array, "..."] | None:
        """The kernel, where ``x @ kernel`` is the whole map: no bias, adapter or int8 scale."""
        more = any(hasattr(self, name) for name in ("bias", "lora", "kernel" + SCALE))
        return None if more else self.kernel[...]

    def weight(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The map's kernel as one array, int8 or adapted as it may be."""
        kernel = stored(self, "kernel").astype(dtype)
        return kernel + self.lora.delta(dtype) if hasattr(self, "lora") else kernel


class Embedding(nnx.Module):
    """A table of ``vocab_size`` rows: the input side of a language model, or both sides."""

    def __init__(self, vocab_size: int, features: int, *, rngs: nnx.Rngs, stddev: float = 0.02):
        self.embedding = nnx.Param(
            normal(rngs.params(), (vocab_size, features), stddev), axes=("vocab", "embed")
        )

    def __call__(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """Rows of the table in ``dtype``. Ids must lie inside it: check them at the boundary."""
        # Gathering the storage-sharded dimension first keeps the look-up local to a device.
        table = constrain(self.embedding[...].astype(dtype), "vocab", "embed")
        return take(table, tokens, ("batch", "seq", "embed"))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The table as an output head (tied embeddings): float32 products with every row."""
        return einsum(
            "btd,vd->btv",
            hidden,
            self.embedding[...].astype(hidden.dtype),
            ("batch", "seq", "vocab"),
            preferred_element_type=jnp.float32,
        )


def conv_kernel(key: jax.Array, channels: Sequence[int], width: int) -> Float[Array, "... W"]:
    """Depthwise kernels ``[*channels, width]`` from U(±1/sqrt(width)), PyTorch's default."""
    bound = 1 / math.sqrt(width)
    return jax.random.uniform(key, (*channels, width), jnp.float32, -bound, bound)
