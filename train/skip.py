"""Passing over a batch: the step that leaves everything as it is but the count of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from .step import Metrics, TrainState


def make_skip_step() -> Callable[[TrainState], tuple[TrainState, Metrics]]:
    """The jitted ``state -> (state, metrics)`` for ``train.skip_steps``; donates ``state``.

    The learning rate moves on with the step, so the schedule ends where it would have; parameters,
    moments and averages stay. A program of its own: that of a real step is the same with and
    without steps to skip.
    """

    def skip_step(state: TrainState) -> tuple[TrainState, Metrics]:
        count = state.opt_state.count + 1
        after = dataclasses.replace(
            state, step=state.step + 1, opt_state=state.opt_state._replace(count=count)
        )
        return after, {"skipped": jax.numpy.float32(1), "finite": jax.numpy.bool_(True)}

    return jax.jit(skip_step, donate_argnames="state")
