"""RMS normalisation, plain and gated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..sharding import constrain


def rms_normalize(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """``x / sqrt(mean(x²) + epsilon)`` over the last dimension, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a gain that starts at one (no "+1").

    The statistics are float32; the result has the dtype of the input and is then scaled, as in the
    published Kimi and Llama code.
    """

    def __init__(self, features: int, *, epsilon: float = 1e-5, axis: str = "embed"):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise over the last dimension."""
        return rms_normalize(x, self.epsilon).astype(x.dtype) * _whole(self.scale).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """``RMSNorm(x) * sigmoid(gate)`` over each head, in float32, with one gain for all heads.

    The output gate of Kimi Delta Attention (arXiv 2510.26692, section 4).
    """

    def __init__(self, features: int, *, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=("head_dim",))
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "B T N V"], gate: Float[Array, "B T N V"]
    ) -> Float[Array, "B T N V"]:
        """Normalise, scale and gate; the result has the dtype of ``gate``."""
        normed = rms_normalize(x, self.epsilon) * self.scale[...]
        return (normed * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(gate.dtype)


def _whole(scale: nnx.Param) -> jax.Array:
    """The gain with its storage-sharded dimension gathered, as activations have it."""
    axes = scale.get_metadata()["axes"]
    return constrain(scale[...], *axes)
