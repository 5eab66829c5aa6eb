"""A profiler trace of chosen steps."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath


class Profiler:
    """Traces ``steps = (first, count)``, counted from 0, into ``<workdir>/profile``; None: nothing.

    A run that resumes in the middle of them traces those that are left.
    """

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None):
        self._directory = workdir / "profile"
        self._steps = range(0) if steps is None else range(steps[0], steps[0] + steps[1])
        self._tracing = False

    def before(self, step: int) -> None:
        """Step number ``step`` is about to be dispatched."""
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, result: Any) -> None:
        """Step number ``step`` was dispatched; ``result`` is something that it computes."""
        if self._tracing and step + 1 not in self._steps:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._stop()
