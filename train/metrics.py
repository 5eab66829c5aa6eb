"""The record of a run, ``metrics.jsonl`` and TensorBoard, and the time that it took."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

FILE = "metrics.jsonl"
_TENSORBOARD = "tensorboard"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, in order; a last line torn by a kill is left out."""
    path = epath.Path(workdir) / FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


class MetricsWriter:
    """Appends to the record of a run, from ``step`` on; what it says about later steps goes first.

    So a run that was killed after its last checkpoint, and then resumed, has no step twice.

    Args:
        workdir: holds ``metrics.jsonl`` and, if it is local, ``tensorboard/``.
        step: the number of steps taken so far.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        workdir = epath.Path(workdir)
        self._path = workdir / FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        text = "".join(_to_line(line) for line in kept)
        # Object stores cannot append: there the file is written anew with every line.
        self._rewritten = text if "://" in str(workdir) else None
        self._board = None
        if self._rewritten is not None:
            self._path.write_text(text)
            return
        import tensorboardX  # Here, so that only runs pay for its import.

        part = workdir / f"{FILE}.part"
        part.write_text(text)
        part.replace(self._path)
        self._board = tensorboardX.SummaryWriter(
            str(workdir / _TENSORBOARD), purge_step=step + 1 if step else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line. ``eval_*`` are the evaluation's; not-finite numbers become null."""
        line = _to_line({"step": step, **values})
        if self._rewritten is None:
            with self._path.open("a") as file:
                file.write(line)
        else:
            self._rewritten += line
            self._path.write_text(self._rewritten)
        if self._board is not None:
            for name, value in values.items():
                group, _, rest = name.partition("_")
                tag = f"eval/{rest}" if group == "eval" else f"train/{name}"
                self._board.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write out what TensorBoard's writer buffers."""
        if self._board is not None:
            self._board.close()


def _to_line(values: Mapping[str, Any]) -> str:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
    return json.dumps(finite) + "\n"


class Stopwatch:
    """Seconds of training proper: evaluations, saving and compilation are left out by pausing."""

    def __init__(self):
        self._total = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Run on, if it is paused."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stand still."""
        if self._since is not None:
            self._total += time.perf_counter() - self._since
            self._since = None

    def lap(self) -> float:
        """Seconds since the last lap, without the pauses."""
        running = self._since is not None
        self.pause()
        seconds, self._total = self._total, 0.0
        if running:
            self.start()
        return seconds
