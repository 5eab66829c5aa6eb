"""The record of a run, ``metrics.jsonl`` and TensorBoard, and the time that it took."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from ..model.storage import is_remote
from .console import tell

FILE = "metrics.jsonl"
# On object stores: the lines that are not in FILE yet, and how many they may be.
TAIL = "metrics.tail.jsonl"
_FOLD = 1000
_TENSORBOARD = "tensorboard"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's record, in order; a last line torn by a kill is left out."""
    workdir = epath.Path(workdir)
    whole, tail = _read_lines(workdir / FILE), _read_lines(workdir / TAIL)
    # A kill between the two writes of a fold leaves the tail's lines in both.
    return whole if tail and whole[-len(tail) :] == tail else whole + tail


def _read_lines(path: epath.Path) -> list[dict[str, Any]]:
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

    So a run that was killed after its last checkpoint, and then resumed, has no step twice. A line
    that cannot be written is reported on standard error, and does not end the run.

    Args:
        workdir: holds ``metrics.jsonl`` and, if it is local, ``tensorboard/``.
        step: the number of steps taken so far.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        workdir = epath.Path(workdir)
        lines = [_to_line(line) for line in read_metrics(workdir) if line["step"] <= step]
        self._board = None
        if is_remote(workdir):
            self._file: _Appended | _Uploaded = _Uploaded(workdir, lines)
            return
        self._file = _Appended(workdir, lines)
        self._board = _Board(workdir / _TENSORBOARD, step)
        with _reporting("TensorBoard's file was not opened"):
            self._board.open()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line. ``eval_*`` are the evaluation's; not-finite numbers become null."""
        with _reporting(f"the metrics of step {step} were not written"):
            self._file.write(_to_line({"step": step, **values}))
        if self._board is not None:
            with _reporting(f"TensorBoard lacks step {step}"):
                self._board.write(step, values)

    def close(self) -> None:
        """Write out what is still held back."""
        with _reporting("the last metrics were not written"):
            self._file.close()
        if self._board is not None:
            with _reporting("TensorBoard's file was not closed"):
                self._board.close()


class _Appended:
    """``metrics.jsonl`` on a local disk."""

    def __init__(self, workdir: epath.Path, lines: list[str]):
        self._path = workdir / FILE
        part = workdir / f"{FILE}.part"
        part.write_text("".join(lines))
        part.replace(self._path)
        # What a moved workdir may have brought from an object store is in `lines`.
        (workdir / TAIL).unlink(missing_ok=True)
        self._torn = ""

    def write(self, line: str) -> None:
        # After a failure a line begins anew: half of one may stand there.
        torn, self._torn = self._torn, "\n"
        with self._path.open("a") as file:
            file.write(torn + line)
        self._torn = ""

    def close(self) -> None:
        pass


class _Board:
    """TensorBoard's files on a local disk, written at once and by the caller.

    tensorboardX's own ``SummaryWriter`` hands its events to a thread, which the first error ends;
    the next events fill its queue, and the run waits for ever. Here an error is raised; the next
    line goes to a new file, since the end of this one is torn.
    """

    def __init__(self, directory: epath.Path, step: int):
        self._directory = directory
        self._next = step + 1
        self._writer: Any = None

    def open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # Only runs pay for its import.
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._directory.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, which begin with the second.
        suffix = f".{time.time_ns()}"
        # TensorBoard drops what earlier files say of this step and later ones: of an attempt that
        # was killed, maybe before its first checkpoint.
        start = Event(step=self._next, session_log=SessionLog(status=SessionLog.START))
        try:
            writer = EventsWriter(os.fspath(self._directory / "events"), suffix)
            self._add(writer, start)
        except Exception:  # A full disk has no room for lines, but for one empty file a line.
            with contextlib.suppress(OSError):
                for empty in self._directory.glob(f"*{suffix}"):
                    empty.unlink()
            raise
        self._writer = writer

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self.open()
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = []
        for name, value in values.items():
            group, _, rest = name.partition("_")
            tag = f"eval/{rest}" if group == "eval" else f"train/{name}"
            scalars.append(Summary.Value(tag=tag, simple_value=value))
        self._add(self._writer, Event(step=step, summary=Summary(value=scalars)))
        self._next = step + 1

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _add(self, writer: Any, event: Any) -> None:
        event.wall_time = time.time()
        try:
            writer.write_event(event)
            writer.flush()
        except BaseException:
            self._writer = None
            with contextlib.suppress(Exception):
                writer.close()
            raise


class _Uploaded:
    """``metrics.jsonl`` on an object store, which cannot append.

    The latest lines are in a small file of their own, written anew with every line; now and then
    they are folded into the large one. Lines of a write that failed go with the next one.
    """

    def __init__(self, workdir: epath.Path, lines: list[str]):
        self._path, self._tail_path = workdir / FILE, workdir / TAIL
        self._folded, self._tail = lines, []
        self._fold()

    def write(self, line: str) -> None:
        self._tail.append(line)
        self._tail_path.write_text("".join(self._tail))
        if len(self._tail) >= _FOLD:
            self._fold()

    def close(self) -> None:
        if self._tail:
            self._fold()

    def _fold(self) -> None:
        self._path.write_text("".join(self._folded + self._tail))
        self._tail_path.write_text("")
        self._folded, self._tail = self._folded + self._tail, []


@contextlib.contextmanager
def _reporting(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Object stores raise errors of their own.
        tell(f"{what}: {error}")


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
