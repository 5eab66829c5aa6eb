"""The numbers of training steps, on their way from the devices to the record of the run.

The host runs ahead of the devices. Reading a number waits for the step that makes it; so numbers
are read only where they are due, when the next step is already under way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from ..configs.experiment import Experiment
from .metrics import Stopwatch

# The pipeline can tell what was in any of its last 64 batches; look before they are forgotten.
_MOST_UNREAD = 32


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient was no finite number; the message says where, and what to do."""


class Ledger:
    """Takes every step's metrics, checks them, and reports those of the steps to be logged.

    A step that was skipped is always reported.

    Args:
        experiment: says which steps are logged, and how many tokens a step has.
        report: called with ``(step, values)`` of a step that is logged.
        explain: called with ``(step, values)`` of a step whose loss or gradient was not finite;
            the error to raise.
        peak: FLOP/s of all devices together; None leaves utilisation out.
    """

    def __init__(
        self,
        experiment: Experiment,
        report: Callable[[int, dict[str, float]], None],
        explain: Callable[[int, dict[str, float]], NonFiniteLoss],
        peak: float | None,
    ):
        data = experiment.data
        self._every, self._last = experiment.train.log_every, experiment.train.steps
        self._skipped = frozenset(experiment.train.skip_steps)
        self._report, self._explain, self._peak = report, explain, peak
        self._tokens = data.batch_size * data.sequence_length
        self._flops = self._tokens * experiment.model.flops_per_token(data.sequence_length)
        self._unread: list[tuple[int, Mapping[str, jax.Array]]] = []
        self._stopwatch = Stopwatch()
        self._timed = 0
        self._made = time.perf_counter()
        self._once: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take the metrics of a step that was just dispatched; report those before it if due.

        Raises:
            NonFiniteLoss: one of the steps before it had none.
        """
        due = any(self._is_due(s) for s, _ in self._unread) or len(self._unread) >= _MOST_UNREAD
        self._unread.append((step, metrics))
        if due:
            self._read(len(self._unread) - 1)

    def settle(self) -> None:
        """Wait for all steps so far, check them, and report those that are due.

        Raises:
            NonFiniteLoss: one of them had none.
        """
        self._read(len(self._unread))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Settle, and do something whose time is not training's."""
        self.settle()
        self._stopwatch.pause()
        yield
        self._stopwatch.start()

    def first_step_done(self) -> float:
        """Settle, and time the steps from here on: compilation is over.

        Returns:
            Seconds since this ledger was made; the next report has them too.
        """
        self.settle()
        seconds = time.perf_counter() - self._made
        self._once = {"seconds_to_first_step": seconds}
        self._stopwatch.lap()
        self._stopwatch.start()
        self._timed = 0
        return seconds

    def _is_due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last or step in self._skipped

    def _read(self, count: int) -> None:
        steps, self._unread = self._unread[:count], self._unread[count:]
        for (step, metrics), finite in zip(
            steps, jax.device_get([metrics["finite"] for _, metrics in steps]), strict=True
        ):
            if not finite:
                raise self._explain(step, _floats(metrics))
            self._timed += 1
            if self._is_due(step):
                self._report(step, _floats(metrics) | self._speed())

    def _speed(self) -> dict[str, float]:
        seconds, steps = self._stopwatch.lap(), self._timed
        once, self._once, self._timed = self._once, {}, 0
        if not steps or not seconds:
            return once
        speed = once | {
            "seconds_per_step": seconds / steps,
            "tokens_per_second": steps * self._tokens / seconds,
        }
        if self._peak:
            speed["mfu"] = steps * self._flops / seconds / self._peak
        return speed


def _floats(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    values = jax.device_get(dict(metrics))
    return {name: float(v) for name, v in values.items() if name not in ("finite", "weight")}
