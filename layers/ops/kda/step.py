"""One decoding step of KDA: the recurrence for a single token, written for latency."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def repeat_heads(x: Array, num_value_heads: int, axis: int) -> Array:
    """Repeats q/k heads so that value head j reads head j // (Hv // H)."""
    groups = num_value_heads // x.shape[axis]
    return x if groups == 1 else jnp.repeat(x, groups, axis=axis)


def kda_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hv K"],
    beta: Float[Array, "B Hv"],
    state: Float[Array, "B Hv K V"],
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B Hv V"], Float[Array, "B Hv K V"]]:
    """Advances the state by one token and reads it; arguments as in `kda`, without the T axis.

    The read uses q^T S' = q^T S + (q . k) delta, so one product of two rows passes over the state
    once; all math in float32. Returns o in v's dtype and the new state.
    """
    out_dtype, dtype = v.dtype, jnp.promote_types(g.dtype, jnp.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (repeat_heads(x.astype(dtype), v.shape[1], axis=1) for x in (q, k))
    v, beta, state = v.astype(dtype), beta[..., None].astype(dtype), state.astype(dtype)
    alpha = jnp.exp(g.astype(dtype))
    rows = jnp.stack([q * alpha, k * alpha], axis=-2)
    read = jnp.einsum("bhrk,bhkv->bhrv", rows, state, precision=jax.lax.Precision.HIGHEST)
    delta = beta * (v - read[..., 1, :])
    o = scale * (read[..., 0, :] + jnp.sum(q * k, axis=-1, keepdims=True) * delta)
    return o.astype(out_dtype), alpha[..., None] * state + k[..., None] * delta[..., None, :]
