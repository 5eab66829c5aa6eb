"""The network of the diffusion and flow heads: residual layers that time and activation modulate.

Source: the released code of arXiv 2510.27688, after DiT (arXiv 2212.09748) and MAR (2406.11838).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...sharding import constrain, repeat
from ..linear import Linear
from ..norm import LayerNorm, rms_normalize

_EPSILON = 1e-6
_TIME_FEATURES = 256
_PERIOD = 10000.0


def _xavier(fan_in: int, fan_out: int) -> float:
    """The standard deviation of PyTorch's ``xavier_uniform_``."""
    return math.sqrt(2 / (fan_in + fan_out))


class AdaLNBlock(nnx.Module):
    """``x + gate * mlp(norm(x) * (1 + scale) + shift)``, all three of the condition."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        embed, mlp = {"embed": width}, {"mlp": width}
        init = {"rngs": rngs, "use_bias": True}
        self.norm = LayerNorm(width, epsilon=_EPSILON)
        self.up_proj = Linear(embed, mlp, stddev=_xavier(width, width), **init)
        self.down_proj = Linear(mlp, embed, stddev=_xavier(width, width), **init)
        self.modulation = Linear({None: width}, {None: 3, "embed": width}, stddev=0.0, **init)

    def __call__(
        self, x: Float[Array, "B M D"], condition: Float[Array, "B M D"]
    ) -> Float[Array, "B M D"]:
        """``condition`` is activated already."""
        shift, scale, gate = jnp.moveaxis(self.modulation(condition), 2, 0)
        h = self.norm(x) * (1 + scale) + shift
        return x + gate * self.down_proj(jax.nn.silu(self.up_proj(h)))


class AdaLNNetwork(nnx.Module):
    """A latent with noise in it, a time and an activation to a prediction.

    Starts as the map to 0.

    Args:
        width: of the activation, and of the network.
        in_features, out_features: numbers of a latent, and of a prediction.
        num_layers: blocks.
    """

    def __init__(
        self, width: int, in_features: int, out_features: int, *, num_layers: int, rngs: nnx.Rngs
    ):
        embed = {"embed": width}
        init = {"rngs": rngs, "use_bias": True}
        self.time_in = Linear({None: _TIME_FEATURES}, {"mlp": width}, stddev=0.02, **init)
        self.time_out = Linear({"mlp": width}, embed, stddev=0.02, **init)
        self.condition_proj = Linear({None: width}, embed, stddev=_xavier(width, width), **init)
        self.input_proj = Linear(
            {None: in_features}, embed, stddev=_xavier(in_features, width), **init
        )
        self.blocks = nnx.List([AdaLNBlock(width, rngs=rngs) for _ in range(num_layers)])
        self.modulation = Linear({None: width}, {None: 2, "embed": width}, stddev=0.0, **init)
        self.output_proj = Linear(embed, {None: out_features}, stddev=0.0, **init)

    def __call__(
        self,
        x: Float[Array, "B M Z"],
        time: Int[Array, "B M"],
        hidden: Float[Array, "B L D"],
    ) -> Float[Array, "B M O"]:
        """The prediction, float32; ``M`` is a multiple of ``L``, see the package."""
        dtype = hidden.dtype
        condition = repeat(self.condition_proj(hidden), x.shape[1] // hidden.shape[1], axis=1)
        times = self.time_in(time_features(time).astype(dtype))
        condition = jax.nn.silu(condition + self.time_out(jax.nn.silu(times)))
        x = self.input_proj(x.astype(dtype))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = jnp.moveaxis(self.modulation(condition), 2, 0)
        x = _normalize(x) * (1 + scale) + shift
        return self.output_proj(constrain(x, "batch", "seq", "embed")).astype(jnp.float32)


def time_features(time: Int[Array, "B M"]) -> Float[Array, "B M 256"]:
    """Cosines, then sines, of the time at 128 frequencies from 1 down to nearly 1 / 10000."""
    half = _TIME_FEATURES // 2
    # On the host: a thousand times an error in the last bit shows, and devices' exp has several.
    exponents = np.float32(-math.log(_PERIOD)) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = time.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _normalize(x: Array) -> Array:
    """Layer normalisation without gain and bias."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return rms_normalize(centred, _EPSILON).astype(x.dtype)
