"""Depthwise causal convolution over a few tokens, with a state to continue from.

    y[t] = sum over i of weight[:, i] * x[t - (W - 1) + i]

so weight[:, W - 1] multiplies the current token, as in the published Kimi Linear weights.
"""

import jax
from jaxtyping import Array, Float, Int

from ....errors import InputError
from .reference import short_conv_reference
from .xla import short_conv_xla

__all__ = ["short_conv"]

_IMPLEMENTATIONS = {"reference": short_conv_reference, "xla": short_conv_xla}
_ACTIVATIONS = {None: lambda y: y, "silu": jax.nn.silu}


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    state: Float[Array, "B S D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
    """Convolves each channel over its last W tokens, in float32.

    Args:
      x: inputs, any float dtype.
      weight: one filter a channel.
      state: the S = W - 1 inputs before the row's first token, oldest first; None is zeros.
      segment_ids: 0 is padding at the left, at the right or between segments: it is skipped and
        its output is zero. The first segment continues from state, later ones start from zeros.
      activation: None or "silu", applied to the sum.
      implementation: "reference", "xla", or None for the best one.

    Returns:
      y in x's dtype, and the new state in the dtype of the old one (x's without one): the last S
      inputs of the row's last segment, preceded by what was before them (the old state, or zeros
      after a segment start).

    Raises:
      InputError: shapes that do not fit together, or an activation or implementation not on offer.
    """
    if activation not in _ACTIVATIONS:
        raise InputError(f"activation={activation!r} must be None or 'silu'")
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        supported = ", ".join(sorted(_IMPLEMENTATIONS))
        raise InputError(f"implementation={implementation!r} is not one of: {supported}, or None")
    if x.ndim != 3 or weight.ndim != 2 or x.shape[2] != weight.shape[0] or not x.shape[1]:
        raise InputError(f"x {x.shape} must be [B, T, D], T > 0, and weight {weight.shape} [D, W]")
    wanted = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    if state is not None and state.shape != wanted:
        raise InputError(f"state has shape {state.shape}; x and weight ask {wanted}")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise InputError(f"segment_ids has shape {segment_ids.shape}; x asks {x.shape[:2]}")
    # A loop carries the state: it comes back in the dtype in which it was given.
    kept = x.dtype if state is None else state.dtype
    if state is not None:
        state = state.astype(x.dtype)
    run = _IMPLEMENTATIONS[implementation or "xla"]
    y, new_state = run(x, weight, state, segment_ids)
    return _ACTIVATIONS[activation](y).astype(x.dtype), new_state.astype(kept)
