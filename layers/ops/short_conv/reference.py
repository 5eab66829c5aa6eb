"""The oracle of the short convolution: one token at a time, a window that slides over tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...segments import is_token, segment_starts


def short_conv_reference(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    state: Float[Array, "B S D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
    """Token scan in float32 without activation; S = W - 1. The state keeps x's dtype.

    None is a state of zeros.
    """
    state = zero_state(x, weight) if state is None else state
    batch, length, _ = x.shape
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    valid, restart = is_token(segment_ids), segment_starts(segment_ids)
    taps = weight.T.astype(jnp.float32)

    def step(state, token):
        x, valid, restart = token
        before = jnp.where(restart[:, None, None], 0, state)
        window = jnp.concatenate([before, x[:, None]], axis=1)
        y = jnp.sum(taps * window.astype(jnp.float32), axis=1)
        keep = valid[:, None]
        return jnp.where(keep[..., None], window[:, 1:], state), jnp.where(keep, y, 0)

    state, y = jax.lax.scan(step, state, (jnp.moveaxis(x, 1, 0), valid.T, restart.T))
    return jnp.moveaxis(y, 0, 1), state


def zero_state(x: Float[Array, "B T D"], weight: Float[Array, "D W"]) -> Float[Array, "B S D"]:
    """The state of rows of which nothing has been read; S = W - 1."""
    # Made from the input, so that it has its sharding.
    return jnp.broadcast_to(jnp.zeros_like(x[:, :1]), (x.shape[0], weight.shape[1] - 1, x.shape[2]))
