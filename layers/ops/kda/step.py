"""One decoding step of KDA: the recurrence for a single token, written for latency."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ....errors import InputError
from .pallas_gpu_step import kda_step_pallas_gpu


def repeat_heads(x: Array, num_value_heads: int, axis: int) -> Array:
    """Repeats q/k heads so that value head j reads head j // (Hv // H)."""
    groups = num_value_heads // x.shape[axis]
    return x if groups == 1 else jnp.repeat(x, groups, axis=axis)


def _xla(q, k, v, g, beta, state, *, scale: float):
    """The read uses q^T S' = q^T S + (q . k) delta, so one product of two rows passes over S."""
    out_dtype, dtype = v.dtype, jnp.promote_types(g.dtype, jnp.float32)
    q, k = (repeat_heads(x.astype(dtype), v.shape[1], axis=1) for x in (q, k))
    v, beta, state = v.astype(dtype), beta[..., None].astype(dtype), state.astype(dtype)
    alpha = jnp.exp(g.astype(dtype))
    rows = jnp.stack([q * alpha, k * alpha], axis=-2)
    read = jnp.einsum("bhrk,bhkv->bhrv", rows, state, precision=jax.lax.Precision.HIGHEST)
    delta = beta * (v - read[..., 1, :])
    o = scale * (read[..., 0, :] + jnp.sum(q * k, axis=-1, keepdims=True) * delta)
    return o.astype(out_dtype), alpha[..., None] * state + k[..., None] * delta[..., None, :]


STEPS = {"xla": _xla, "pallas_gpu": kda_step_pallas_gpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(run, scale, *arrays):
    return run(*arrays, scale=scale)


def _kernel_forward(run, scale, *arrays):
    return run(*arrays, scale=scale), arrays


def _kernel_backward(run, scale, arrays, cotangents):
    # One token is differentiated in tests and odd batches only: no kernel for it.
    return jax.vjp(functools.partial(_xla, scale=scale), *arrays)[1](cotangents)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def kda_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hv K"],
    beta: Float[Array, "B Hv"],
    state: Float[Array, "B Hv K V"],
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B Hv V"], Float[Array, "B Hv K V"]]:
    """Advances the state by one token and reads it; arguments as in `kda`, without the T axis.

    All math in float32. `implementation` is "xla", "pallas_gpu" (a kernel that reads and writes the
    state once; lowered for CUDA) or None, which is "xla". Returns o in v's dtype and the new state.

    Raises:
      InputError: an implementation that is not on offer, or was named and cannot run here.
    """
    if implementation is not None and implementation not in STEPS:
        raise InputError(
            f"implementation={implementation!r} is not one of: {', '.join(STEPS)}, or None"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = STEPS[implementation or "xla"]
    if run is _xla:
        return _xla(q, k, v, g, beta, state, scale=scale)
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return _kernel(run, scale, q, k, v, g, beta, state.astype(g.dtype))
