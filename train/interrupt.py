"""Stopping on request: the first SIGTERM or Ctrl-C asks, the second one kills."""

from __future__ import annotations

import signal
import threading

import jax
import numpy as np

from .console import tell

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, turns the first SIGTERM or SIGINT into a request.

    The handlers that were there before come back with the first signal, so a second one acts as
    usual. Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self):
        self.signal: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def agreed(self, meeting: bool) -> bool:
        """Whether to stop now: the same answer in every process.

        Args:
            meeting: this is a step at which all processes ask. With several processes a request
                waits for one, because they must leave after the same step.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if not meeting:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.signal is not None)).any())

    def _ask(self, number, frame) -> None:
        self.signal = signal.Signals(number).name
        self._restore()
        tell(
            f"{self.signal}: finishing this step and saving; once more ends at once without saving"
        )

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
