"""The log-decay gates of KDA and the key normalisation, all in float32.

Both gates map the pre-activation z (low-rank projection plus `dt_bias`) to a log-decay g <= 0 per
key channel. Published Kimi Linear weights use the unbounded softplus form; later models of the
family use the bounded one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ....errors import InputError


def l2norm(x: Float[Array, "... K"], eps: float = 1e-6) -> Float[Array, "... K"]:
    """x / sqrt(sum(x^2) + eps) over the last axis, computed and returned in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def softplus_gate(z: Float[Array, "*B H K"], A_log: Float[Array, "H"]) -> Float[Array, "*B H K"]:
    """g = -exp(A_log) * softplus(z): log-decay in nats per step, float32, unbounded below."""
    rate = jnp.exp(A_log.astype(jnp.float32))[:, None]
    return -rate * jax.nn.softplus(z.astype(jnp.float32))


def bounded_gate(
    z: Float[Array, "*B H K"], A_log: Float[Array, "H"], lower_bound: float = -5.0
) -> Float[Array, "*B H K"]:
    """g = lower_bound * sigmoid(exp(A_log) * z): log-decay in nats per step, float32.

    Raises InputError unless -5 <= lower_bound < 0, the range for which the family's kernels are
    specified.
    """
    if not -5.0 <= lower_bound < 0.0:
        raise InputError(
            f"lower_bound={lower_bound} must lie in [-5, 0); the published value is -5"
        )
    rate = jnp.exp(A_log.astype(jnp.float32))[:, None]
    return lower_bound * jax.nn.sigmoid(rate * z.astype(jnp.float32))
