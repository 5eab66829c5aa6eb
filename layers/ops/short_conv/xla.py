"""The short convolution as W shifted multiply-adds.

Elementwise, so it fuses with its neighbours and needs nothing of a sharded channel axis, where a
grouped convolution would.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...segments import is_token, segment_index
from .reference import zero_state


def short_conv_xla(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    state: Float[Array, "B S D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
    """Shifted multiply-adds in float32 without activation; S = W - 1. A state of None is zeros."""
    if segment_ids is not None:
        return _packed(x, weight, state, segment_ids)
    if state is None:
        state = zero_state(x, weight)
    window = jnp.concatenate([state, x], axis=1)
    if x.shape[1] == 1:
        y = sum(_tap(weight, i) * window[:, i].astype(jnp.float32) for i in range(window.shape[1]))
        return y[:, None], window[:, 1:]
    return _shifted_sum(window, weight, None), window[:, x.shape[1] :]


def _tap(weight: Array, i: int) -> Array:
    return weight[:, i].astype(jnp.float32)


@jax.custom_vjp
def _shifted_sum(
    window: Float[Array, "B ST D"], weight: Float[Array, "D W"], seen: Bool[Array, "W B T"] | None
) -> Float[Array, "B T D"]:
    """``sum over i of weight[:, i] * window[:, t + i]`` over the taps ``seen`` from token t.

    The gradient is written out because its automatic form, a padded copy a tap that is masked
    first, takes XLA's CPU backend three times as long, and keeps every tap's input.
    """
    length = window.shape[1] - weight.shape[1] + 1
    taps = (
        _masked(seen, i, _tap(weight, i) * window[:, i : i + length].astype(jnp.float32))
        for i in range(weight.shape[1])
    )
    return sum(taps)


def _masked(seen: Array | None, i: int, x: Array) -> Array:
    return x if seen is None else jnp.where(seen[i][..., None], x, 0)


def _shifted_sum_fwd(window, weight, seen):
    return _shifted_sum(window, weight, seen), (window, weight, seen)


def _shifted_sum_bwd(residuals, dy):
    window, weight, seen = residuals
    width, length = weight.shape[1], dy.shape[1]
    around = jnp.pad(dy, ((0, 0), (width - 1, width - 1), (0, 0)))
    if seen is not None:
        seen_from = jnp.pad(seen, ((0, 0), (0, 0), (width - 1, width - 1)))
    dwindow, dweight = 0.0, []
    for i in range(width):
        # Input s is tap i of the token s - i.
        tokens = slice(width - 1 - i, width - 1 - i + window.shape[1])
        mask = None if seen is None else seen_from[:, :, tokens]
        dwindow = dwindow + _masked(mask, i, _tap(weight, i) * around[:, tokens])
        inputs = window[:, i : i + length].astype(jnp.float32)
        dweight.append(jnp.sum(_masked(seen, i, dy * inputs), axis=(0, 1)))
    dweight = jnp.stack(dweight, axis=1)
    return dwindow.astype(window.dtype), dweight.astype(weight.dtype), None


_shifted_sum.defvjp(_shifted_sum_fwd, _shifted_sum_bwd)


def _packed(x, weight, state, segment_ids):
    """Taps stop at segment starts; the old state stands right before the row's first token."""
    width, length = weight.shape[1], x.shape[1]
    valid = is_token(segment_ids)
    number = jnp.where(valid, segment_index(segment_ids), -1)
    rank = jnp.cumsum(valid, axis=1) - 1  # tokens before each token
    x = jnp.where(valid[..., None], x, 0)

    # Nothing that stands before the row belongs to a segment of it.
    window = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    numbers = jnp.pad(number, ((0, 0), (width - 1, 0)), constant_values=-1)
    same = (numbers[:, i : i + length] == number for i in range(width))
    y = _shifted_sum(window, weight, jnp.stack([valid & one for one in same]))
    # Without a state there is nothing to reach.
    for seen in range(0 if state is None else width - 1):
        # The row's token number `seen` still reaches width - 1 - seen inputs of the old state.
        reach = sum(
            _tap(weight, i) * state[:, i + seen].astype(jnp.float32)
            for i in range(width - 1 - seen)
        )
        here = (number == 0) & (rank == seen) & valid
        y = y + jnp.where(here[..., None], reach[:, None], 0)

    # New state: the last tokens of the last segment, then old state or zeros; by one-hot products,
    # which shard over rows and channels alike.
    count = rank[:, -1:] + 1
    last = jnp.max(number, axis=1, keepdims=True)
    old = jnp.zeros_like(count) + jnp.arange(1 - width, 0)
    ranks = jnp.concatenate([old, jnp.where(valid, rank, length)], axis=1)
    numbers = jnp.concatenate([jnp.zeros_like(old), number], axis=1)
    wanted = count + old
    pick = (ranks[:, None, :] == wanted[..., None]) & (numbers == jnp.maximum(last, 0))[:, None, :]
    if state is not None:
        window = jnp.concatenate([state, x], axis=1)
    new_state = jnp.einsum(
        "bst,btd->bsd", pick.astype(x.dtype), window, precision=jax.lax.Precision.HIGHEST
    )
    return y, new_state
