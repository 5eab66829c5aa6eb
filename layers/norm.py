"""RMS normalisation, plain and gated, and layer normalisation."""

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
    """Root-mean-square normalisation with a gain that starts at one.

    The statistics are float32; the result has the dtype of the input and is then scaled, as in the
    published Kimi and Llama code. With ``unit_offset`` the gain is ``1 + scale``, the parameter
    starts at zero, and all of it is float32 before the cast, as in Gemma's.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-5,
        axis: str = "embed",
        unit_offset: bool = False,
    ):
        start = jnp.zeros if unit_offset else jnp.ones
        self.scale = nnx.Param(start((features,), jnp.float32), axes=(axis,))
        self.epsilon = epsilon
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise over the last dimension."""
        normed, scale = rms_normalize(x, self.epsilon), _whole(self.scale)
        if self.unit_offset:
            return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias``, in float32 (arXiv 1607.06450)."""

    def __init__(self, features: int, *, epsilon: float = 1e-5, axis: str = "embed"):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise over the last dimension; the result has the dtype of ``x``."""
        x32 = x.astype(jnp.float32)
        # The variance of centred values: a difference of means of squares would cancel.
        normed = rms_normalize(x32 - jnp.mean(x32, axis=-1, keepdims=True), self.epsilon)
        scale, bias = (_whole(p).astype(jnp.float32) for p in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


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


def _whole(param: nnx.Param) -> jax.Array:
    """A gain or bias with its storage-sharded dimension gathered, as activations have it."""
    axes = param.get_metadata()["axes"]
    return constrain(param[...], *axes)
