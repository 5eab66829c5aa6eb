"""Kimi Delta Attention: the linear-attention mixer of Kimi Linear (arXiv 2510.26692, section 4)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..sharding import constrain, kernel_map
from .linear import Linear, conv_kernel
from .norm import GatedRMSNorm
from .ops.kda import bounded_gate, kda, l2norm, softplus_gate
from .ops.short_conv import short_conv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KDACache:
    """What KDA remembers of a sequence, constant in its length.

    Fields are arrays, or what stands for them in a tree of shapes or shardings.

    Attributes:
        q_conv, k_conv, v_conv: the last ``W - 1`` inputs of each short convolution,
            ``[B, W-1, channels]``.
        state: the fast weights ``[B, Hv, K, V]``, float32.
    """

    q_conv: Any
    k_conv: Any
    v_conv: Any
    state: Any


class KimiDeltaAttention(nnx.Module):
    """Gated delta rule with a decay for every key channel, short convolutions and an output gate.

    Args:
        features: model width D.
        num_heads: query and key heads H; ``num_value_heads`` (H if None) is a multiple of it.
        head_dim: width of a head's keys and values, and the rank of the two gate projections.
        conv_size: taps of the short convolutions.
        gate_lower_bound: None for the unbounded softplus gate of the published weights, or the
            bound (-5) of the bounded sigmoid gate.
        epsilon: of the output norm.
        implementation: of the operator; see :func:`.ops.kda.kda`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        num_value_heads: int | None = None,
        conv_size: int = 4,
        gate_lower_bound: float | None = None,
        epsilon: float = 1e-5,
        stddev: float = 0.02,
        chunk_size: int | None = None,
        implementation: str | None = None,
    ):
        values = num_value_heads or num_heads
        model, rank = {"embed": features}, {"latent": head_dim}
        keys = {"heads": num_heads, "head_dim": head_dim}
        value = {"heads": values, "head_dim": head_dim}
        init = {"rngs": rngs, "stddev": stddev}
        self.q_proj = Linear(model, keys, **init)
        self.k_proj = Linear(model, keys, **init)
        self.v_proj = Linear(model, value, **init)
        conv_axes = ("heads", "head_dim", None)
        self.q_conv = nnx.Param(
            conv_kernel(rngs.params(), tuple(keys.values()), conv_size), axes=conv_axes
        )
        self.k_conv = nnx.Param(
            conv_kernel(rngs.params(), tuple(keys.values()), conv_size), axes=conv_axes
        )
        self.v_conv = nnx.Param(
            conv_kernel(rngs.params(), tuple(value.values()), conv_size), axes=conv_axes
        )
        self.f_a_proj = Linear(model, rank, **init)
        self.f_b_proj = Linear(rank, value, **init)
        self.b_proj = Linear(model, {"heads": values}, **init)
        self.g_a_proj = Linear(model, rank, **init)
        self.g_b_proj = Linear(rank, value, **init)
        self.o_norm = GatedRMSNorm(head_dim, epsilon=epsilon)
        self.o_proj = Linear(value, model, **init)
        self.A_log = nnx.Param(
            _initial_a_log(rngs.params(), values, gate_lower_bound), axes=("heads",)
        )
        self.dt_bias = nnx.Param(
            _initial_dt_bias(rngs.params(), (values, head_dim)), axes=("heads", "head_dim")
        )
        self.gate_lower_bound = gate_lower_bound
        self.chunk_size = chunk_size
        self.implementation = implementation

    def init_cache(self, batch: int, dtype: DTypeLike) -> KDACache:
        """The cache of ``batch`` sequences of which nothing has been read."""
        heads, width, taps = self.q_conv.shape
        values = self.v_conv.shape[0]
        keys = jnp.zeros((batch, taps - 1, heads * width), dtype)
        value = jnp.zeros((batch, taps - 1, values * width), dtype)
        state = jnp.zeros((batch, values, width, width), jnp.float32)
        return KDACache(
            q_conv=constrain(keys, "batch", None, "heads"),
            k_conv=constrain(keys, "batch", None, "heads"),
            v_conv=constrain(value, "batch", None, "heads"),
            state=constrain(state, "batch", "heads", None, None),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KDACache | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KDACache | None]:
        """Mix over time.

        Args:
            x: normalised activations.
            cache: of the tokens before; None starts from nothing and returns no cache.
            segment_ids: 0 is padding; see :mod:`.segments`.

        Returns:
            The mixer's output in the dtype of ``x``, and the cache after the last token.
        """
        q, q_conv = self._stream(self.q_proj, self.q_conv, x, cache and cache.q_conv, segment_ids)
        k, k_conv = self._stream(self.k_proj, self.k_conv, x, cache and cache.k_conv, segment_ids)
        v, v_conv = self._stream(self.v_proj, self.v_conv, x, cache and cache.v_conv, segment_ids)
        g = self._log_decay(x)
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        q, k = l2norm(q).astype(x.dtype), l2norm(k).astype(x.dtype)
        o, state = self._delta_rule(q, k, v, g, beta, cache and cache.state, segment_ids)
        o = constrain(o, "batch", "seq", "heads", None)
        gate = self.g_b_proj(self.g_a_proj(x))
        out = self.o_proj(self.o_norm(o, gate))
        if cache is None:
            return out, None
        return out, KDACache(q_conv, k_conv, v_conv, state)

    def _stream(self, proj, conv, x, state, segment_ids):
        """Projection, short convolution and SiLU: ``[B, T, heads, width]``."""
        # Both the convolution and the delta rule run along whole rows.
        u = constrain(proj(x), "batch", None, "heads", None)
        batch, length, heads, width = u.shape
        kernel = conv[...].astype(x.dtype).reshape(heads * width, -1)
        y, state = short_conv(
            u.reshape(batch, length, heads * width),
            kernel,
            state=state,
            segment_ids=None if segment_ids is None else constrain(segment_ids, "batch", None),
            activation="silu",
        )
        return y.reshape(u.shape), state

    def _log_decay(self, x):
        """The log-decay ``[B, T, Hv, K]``, float32, at most 0."""
        z = self.f_b_proj(self.f_a_proj(x)).astype(jnp.float32) + self.dt_bias[...]
        if self.gate_lower_bound is None:
            return softplus_gate(z, self.A_log[...])
        return bounded_gate(z, self.A_log[...], self.gate_lower_bound)

    def _delta_rule(self, q, k, v, g, beta, state, segment_ids):
        optional = {"initial_state": state, "segment_ids": segment_ids}
        given = {name: value for name, value in optional.items() if value is not None}
        heads = ("batch", None, "heads", None)
        axes = {"initial_state": ("batch", "heads", None, None), "segment_ids": ("batch", None)}

        def run(q, k, v, g, beta, *rest):
            return kda(
                q,
                k,
                v,
                g,
                beta,
                chunk_size=self.chunk_size,
                gate_lower_bound=self.gate_lower_bound,
                implementation=self.implementation,
                **dict(zip(given, rest, strict=True)),
            )

        return kernel_map(
            run,
            (heads, heads, heads, heads, heads[:3], *(axes[name] for name in given)),
            (heads, axes["initial_state"]),
        )(q, k, v, g, beta, *given.values())


def _initial_a_log(key, heads, gate_lower_bound):
    """log U(1, 16) per head; 0 where the gate is bounded."""
    if gate_lower_bound is not None:
        return jnp.zeros((heads,), jnp.float32)
    return jnp.log(jax.random.uniform(key, (heads,), jnp.float32, 1.0, 16.0))


def _initial_dt_bias(key, shape):
    """The inverse softplus of time steps that are log-uniform in [1e-3, 1e-1]."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))
