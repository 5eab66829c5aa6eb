"""The oracle of KDA: the recurrence, one token at a time, in float32.

No chunking, no clipping, no damping: every other implementation is judged against this file.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...segments import is_token, segment_starts

_EXACT = jax.lax.Precision.HIGHEST


def kda_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Token scan: decay the state, apply the delta rule to the decayed state, read it.

    Takes one q/k head per value head; chunk_size means nothing here. Returns o in v's dtype and
    the final state in float32 (float64 inputs stay float64, for finite differences).
    Source: Kimi Linear report, section 3.
    """
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    batch, length = q.shape[:2]
    if segment_ids is None:
        valid = jnp.ones((batch, length), bool)
        restart = jnp.zeros((batch, length), bool)
    else:
        valid = is_token(segment_ids)
        restart = segment_starts(segment_ids)

    def step(state, token):
        q, k, v, g, beta, valid, restart = token
        start = jnp.where(restart[:, None, None, None], 0.0, state)
        decayed = jnp.exp(g)[..., None] * start
        predicted = jnp.einsum("bhk,bhkv->bhv", k, decayed, precision=_EXACT)
        delta = beta[..., None] * (v - predicted)
        written = decayed + k[..., None] * delta[..., None, :]
        o = scale * jnp.einsum("bhk,bhkv->bhv", q, written, precision=_EXACT)
        keep = valid[:, None, None]
        return jnp.where(keep[..., None], written, state), jnp.where(keep, o, 0.0)

    tokens = tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, g, beta))
    masks = (valid.T, restart.T)
    state, o = jax.lax.scan(step, initial_state.astype(dtype), (*tokens, *masks))
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state
