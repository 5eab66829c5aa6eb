"""Rotary position embeddings (RoFormer, arXiv 2104.09864), on all of a head or its first part."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T N K"],
    positions: Int[Array, "B T"],
    rotary_dim: int,
    theta: float = 10000.0,
) -> Float[Array, "B T N K"]:
    """``x`` with pair ``(j, j + r/2)`` of its first ``r = rotary_dim`` dimensions turned.

    The angle of pair ``j`` is ``positions * theta ** (-2 j / r)``, in radians. The pairing by
    halves is the one that published GPT-NeoX, Llama and Gemma weights expect (RoFormer itself pairs
    neighbours). Angles and products are float32; the result has the dtype of ``x``.
    """
    half = rotary_dim // 2
    frequencies = (theta ** (-np.arange(half) / half)).astype(np.float32)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b, rest = jnp.split(x, [half, rotary_dim], axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)
