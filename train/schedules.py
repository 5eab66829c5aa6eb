"""Learning rates as functions of the step: an ``optax.Schedule`` from its settings."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from ..configs.optimizers import WSD, Constant, Cosine, Linear, Schedule


def make_schedule(schedule: Schedule, steps: int) -> optax.Schedule:
    """The learning rate of step ``0 .. steps - 1`` (float32 for a traced step).

    Warm-up reaches the peak with its last step rather than starting at zero, and a decay would
    reach ``final`` one step after the last: no step is spent at a rate of zero.

    Args:
        schedule: its settings.
        steps: optimizer steps of the run, where a decay ends.
    """
    peak, warmup = schedule.learning_rate, schedule.warmup_steps
    match schedule:
        case Constant():
            main = optax.constant_schedule(peak)
        case Cosine():
            main = _cosine(peak, schedule.final, steps - warmup)
        case Linear():
            main = optax.linear_schedule(peak, schedule.final, steps - warmup)
        case WSD(decay_steps=0):
            main = optax.constant_schedule(peak)
        case WSD():
            stable = steps - warmup - schedule.decay_steps
            main = optax.join_schedules([optax.constant_schedule(peak), _decay(schedule)], [stable])
    if not warmup:
        return main
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, main], [warmup])


def _decay(schedule: WSD) -> optax.Schedule:
    peak, final, steps = schedule.learning_rate, schedule.final, schedule.decay_steps
    match schedule.decay:
        case "cosine":
            return _cosine(peak, final, steps)
        case "linear":
            return optax.linear_schedule(peak, final, steps)

    def one_minus_sqrt(count):
        passed = jnp.clip(count / steps, 0.0, 1.0)
        return final + (peak - final) * (1 - jnp.sqrt(passed))

    return one_minus_sqrt


def _cosine(peak: float, final: float, steps: int) -> optax.Schedule:
    # optax expresses the end as a fraction of the start.
    return optax.cosine_decay_schedule(peak, max(steps, 1), alpha=final / peak if peak else 0.0)
