"""The short convolution as W shifted multiply-adds.

Elementwise, so it fuses with its neighbours and needs nothing of a sharded channel axis, where a
grouped convolution would.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...segments import is_token, segment_index


def short_conv_xla(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    state: Float[Array, "B S D"],
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
    """Shifted multiply-adds in float32 without activation; S = W - 1."""
    if segment_ids is not None:
        return _packed(x, weight, state, segment_ids)
    if x.shape[1] == 1:
        window = [*(state[:, i] for i in range(state.shape[1])), x[:, 0]]
        y = sum(_tap(weight, i) * step.astype(jnp.float32) for i, step in enumerate(window))
        return y[:, None], jnp.concatenate([state[:, 1:], x], axis=1)
    length = x.shape[1]
    window = jnp.concatenate([state, x], axis=1)
    y = sum(
        _tap(weight, i) * window[:, i : i + length].astype(jnp.float32)
        for i in range(weight.shape[1])
    )
    return y, window[:, length:]


def _tap(weight: Array, i: int) -> Array:
    return weight[:, i].astype(jnp.float32)


def _packed(x, weight, state, segment_ids):
    """Taps stop at segment starts; the old state stands right before the row's first token."""
    width, length = weight.shape[1], x.shape[1]
    valid = is_token(segment_ids)
    number = jnp.where(valid, segment_index(segment_ids), -1)
    rank = jnp.cumsum(valid, axis=1) - 1  # tokens before each token
    x = jnp.where(valid[..., None], x, 0)

    y = _tap(weight, width - 1) * x.astype(jnp.float32)
    for back in range(1, width):
        if back < length:
            earlier = jnp.pad(x[:, :-back], ((0, 0), (back, 0), (0, 0)))
            same = number == jnp.pad(number[:, :-back], ((0, 0), (back, 0)), constant_values=-1)
            term = _tap(weight, width - 1 - back) * earlier.astype(jnp.float32)
            y = y + jnp.where(same[..., None], term, 0)
    for seen in range(width - 1):
        # The row's token number `seen` still reaches width - 1 - seen inputs of the old state.
        reach = sum(
            _tap(weight, i) * state[:, i + seen].astype(jnp.float32)
            for i in range(width - 1 - seen)
        )
        here = (number == 0) & (rank == seen)
        y = y + jnp.where(here[..., None], reach[:, None], 0)
    y = jnp.where(valid[..., None], y, 0)

    # New state: the last tokens of the last segment, then old state or zeros; by one-hot products,
    # which shard over rows and channels alike.
    count = rank[:, -1:] + 1
    last = jnp.max(number, axis=1, keepdims=True)
    old = jnp.zeros_like(count) + jnp.arange(1 - width, 0)
    ranks = jnp.concatenate([old, jnp.where(valid, rank, length)], axis=1)
    numbers = jnp.concatenate([jnp.zeros_like(old), number], axis=1)
    wanted = count + old
    pick = (ranks[:, None, :] == wanted[..., None]) & (numbers == jnp.maximum(last, 0))[:, None, :]
    window = jnp.concatenate([state, x], axis=1)
    new_state = jnp.einsum(
        "bst,btd->bsd", pick.astype(x.dtype), window, precision=jax.lax.Precision.HIGHEST
    )
    return y, new_state
