"""How noise goes away over the steps of a denoising run, in closed form.

After step ``i`` of ``S`` a position is masked with probability ``m(i + 1)``, where ``m(0) = 1`` and
``m(S) = 0``: ``1 - alpha`` at time ``1 - i / S``. The time of Dream runs from 1 to 1e-3 instead,
and its last step commits what is left.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SCHEDULES = ("linear", "poly2", "cosine", "dream")
# The time at which Dream's grid ends.
_DREAM_END = 1e-3


def masked_share(schedule: str, step: Int[Array, "..."], steps: Int[Array, "..."]) -> Array:
    """``m(step)``: the part still masked before step ``step``, float32."""
    done = jnp.asarray(step, jnp.float32) / steps
    if schedule == "linear":
        return 1 - done
    if schedule == "poly2":
        return (1 - done) ** 2
    if schedule == "cosine":
        return jnp.where(done < 1, jnp.cos(jnp.pi / 2 * done), 0.0)
    return jnp.where(done < 1, 1 - (1 - _DREAM_END) * done, 0.0)


def share(schedule: str, step: Int[Array, "..."], steps: Int[Array, "..."]) -> Array:
    """``1 - m(step + 1) / m(step)``: the part of what is masked that step ``step`` reveals."""
    left = jnp.asarray(steps - step, jnp.float32)
    # Written without the difference of two rounded numbers: a share of a half stays one.
    if schedule == "linear":
        part = 1 / left
    elif schedule == "poly2":
        part = (2 * left - 1) / left**2
    elif schedule == "cosine":
        now, after = (masked_share(schedule, s, steps) for s in (step, step + 1))
        part = 1 - after / now
    else:
        part = (1 - _DREAM_END) / (steps - (1 - _DREAM_END) * step)
    return jnp.where(left > 1, part, 1.0)


def reveal_step(
    schedule: str,
    uniform: Float[Array, "..."],
    step: Int[Array, "..."],
    steps: Int[Array, "..."],
) -> Int[Array, "..."]:
    """The step, ``step`` or later, in which a position masked before ``step`` is revealed.

    Args:
        schedule: of :data:`SCHEDULES`.
        uniform: draws in [0, 1).
        step: at which the position is still masked.
        steps: of the whole run.
    """
    left = uniform * masked_share(schedule, step, steps)
    if schedule == "linear":
        done = 1 - left
    elif schedule == "poly2":
        done = 1 - jnp.sqrt(left)
    elif schedule == "cosine":
        done = 2 / jnp.pi * jnp.arccos(left)
    else:
        done = (1 - left) / (1 - _DREAM_END)
    after = jnp.ceil(done * steps).astype(jnp.int32)
    return jnp.clip(after - 1, step, steps - 1)
