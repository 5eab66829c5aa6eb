"""The dense feed-forward layer."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from .linear import Linear


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))``, without biases (arXiv 2002.05202)."""

    def __init__(
        self, features: int, hidden_features: int, *, rngs: nnx.Rngs, stddev: float = 0.02
    ):
        model, hidden = {"embed": features}, {"mlp": hidden_features}
        self.gate_proj = Linear(model, hidden, rngs=rngs, stddev=stddev)
        self.up_proj = Linear(model, hidden, rngs=rngs, stddev=stddev)
        self.down_proj = Linear(hidden, model, rngs=rngs, stddev=stddev)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
