"""The dense feed-forward layers: gated without biases, and plain with them."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from .linear import Linear


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh approximation (arXiv 1606.08415, section 2)."""
    return jax.nn.gelu(x, approximate=True)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, ``x`` times the normal distribution function."""
    return jax.nn.gelu(x, approximate=False)


class GatedMLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``, without biases (arXiv 2002.05202).

    Args:
        features: model width.
        hidden_features: width between.
        activation: of the gate: SiLU makes it SwiGLU, :data:`gelu_tanh` Gemma's GeGLU.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        rngs: nnx.Rngs,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        stddev: float = 0.02,
    ):
        model, hidden = {"embed": features}, {"mlp": hidden_features}
        self.gate_proj = Linear(model, hidden, rngs=rngs, stddev=stddev)
        self.up_proj = Linear(model, hidden, rngs=rngs, stddev=stddev)
        self.down_proj = Linear(hidden, model, rngs=rngs, stddev=stddev)
        self.activation = activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


# The gate of Kimi's dense layers and shared experts.
SwiGLU = GatedMLP


class MLP(nnx.Module):
    """``down(activation(up(x)))`` with biases; the activation is the exact GELU unless told."""

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        rngs: nnx.Rngs,
        activation: Callable[[jax.Array], jax.Array] = gelu,
        stddev: float = 0.02,
    ):
        model, hidden = {"embed": features}, {"mlp": hidden_features}
        init = {"rngs": rngs, "stddev": stddev, "use_bias": True}
        self.up_proj = Linear(model, hidden, **init)
        self.down_proj = Linear(hidden, model, **init)
        self.activation = activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token."""
        return self.down_proj(self.activation(self.up_proj(x)))
