"""CALM's energy head: noise and an activation to a latent, in one pass.

Source: arXiv 2510.27688, section 4.2, and the released code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ...sharding import repeat
from ..linear import Linear
from ..norm import LayerNorm

_EPSILON = 1e-6


class EnergyBlock(nnx.Module):
    """``x + down(silu(g) * v)`` with ``g, v`` of two hidden layers over ``norm(x)`` and ``c``."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, stddev: float):
        init = {"rngs": rngs, "use_bias": True, "stddev": stddev}
        embed, mlp = {"embed": width}, {"mlp": width}
        self.norm = LayerNorm(width, epsilon=_EPSILON)
        # One map of (norm(x), c) in two parts: what is of c is the same for every draw.
        self.x_proj = Linear(embed, mlp, rngs=rngs, stddev=stddev)
        self.condition_proj = Linear(embed, mlp, **init)
        self.hidden_proj = Linear(mlp, embed, **init)
        self.gate_up_proj = Linear(embed, {None: 2, "mlp": width}, **init)
        self.down_proj = Linear(mlp, embed, **init)

    def __call__(
        self, x: Float[Array, "B M D"], condition: Float[Array, "B L D"]
    ) -> Float[Array, "B M D"]:
        """``M`` is a multiple of ``L``: draws of one activation stand next to each other."""
        draws = x.shape[1] // condition.shape[1]
        u = self.x_proj(self.norm(x)) + repeat(self.condition_proj(condition), draws, axis=1)
        u = self.gate_up_proj(jax.nn.silu(self.hidden_proj(jax.nn.silu(u))))
        return x + self.down_proj(jax.nn.silu(u[:, :, 0]) * u[:, :, 1])


class EnergyHead(nnx.Module):
    """A residual stack that turns uniform noise into a latent, given an activation.

    Its last layer starts at zero, so that a fresh head draws 0, always.

    Args:
        width: of the activation, and of the head.
        latent_size: numbers Z of a latent.
        num_layers: blocks.
        noise_size: numbers of a draw's noise.
    """

    def __init__(
        self,
        width: int,
        latent_size: int,
        *,
        num_layers: int,
        noise_size: int = 64,
        rngs: nnx.Rngs,
        stddev: float = 0.02,
    ):
        init = {"rngs": rngs, "use_bias": True}
        embed = {"embed": width}
        self.noise_shape = (noise_size,)
        self.noise_proj = Linear({None: noise_size}, embed, stddev=stddev, **init)
        self.noise_norm = LayerNorm(width, epsilon=_EPSILON)
        self.hidden_proj = Linear({None: width}, embed, stddev=stddev, **init)
        self.hidden_norm = LayerNorm(width, epsilon=_EPSILON)
        self.blocks = nnx.List(
            [EnergyBlock(width, rngs=rngs, stddev=stddev) for _ in range(num_layers)]
        )
        self.final_norm = LayerNorm(width, epsilon=_EPSILON)
        self.final_hidden = Linear(embed, {"mlp": width}, stddev=stddev, **init)
        self.final_proj = Linear({"mlp": width}, {None: latent_size}, stddev=0.0, **init)

    def noise(self, key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Noise for ``shape`` draws: uniform in [-0.5, 0.5), ``[*shape, noise_size]`` float32."""
        return jax.random.uniform(key, (*shape, *self.noise_shape), jnp.float32, -0.5, 0.5)

    def __call__(
        self, hidden: Float[Array, "B L D"], noise: Float[Array, "B M U"]
    ) -> Float[Array, "B M Z"]:
        """Draws, ``M / L`` of each activation next to each other; float32."""
        x = self.noise_norm(self.noise_proj(noise.astype(hidden.dtype)))
        condition = self.hidden_norm(self.hidden_proj(hidden))
        for block in self.blocks:
            x = block(x, condition)
        x = jax.nn.silu(self.final_hidden(self.final_norm(x)))
        return self.final_proj(x).astype(jnp.float32)
