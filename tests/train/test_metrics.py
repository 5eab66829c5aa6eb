"""The record of a run: appending, resuming without duplicates, the terminal, the picture."""

import errno
import io
import json
import os
import resource
import signal
import struct
from typing import ClassVar

import jax
import pytest

from jaxalope.errors import SaveError
from jaxalope.train import hardware, metrics
from jaxalope.train.console import Console, tell
from jaxalope.train.metrics import MetricsWriter, Stopwatch, read_metrics
from jaxalope.train.plots import loss_picture, write_loss_picture


def write(workdir, start, stop):
    writer = MetricsWriter(workdir, start)
    for step in range(start + 1, stop + 1):
        writer.write(step, {"loss": 10.0 / step, "tokens_per_second": 5.0})
    writer.close()


def test_a_resumed_run_has_every_step_once_and_no_torn_line(tmp_path):
    write(tmp_path, 0, 8)
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 9, "lo')  # killed in mid-line
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))
    write(tmp_path, 5, 10)
    text = (tmp_path / metrics.FILE).read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, 11))


def test_a_fresh_run_clears_what_an_unsaved_one_left(tmp_path):
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 1)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}]


class Store:
    """A path of an object store: written whole, and counted."""

    written: ClassVar[list[tuple[str, int]]] = []
    fails = False

    def __init__(self, path):
        self.path = path

    def __truediv__(self, name):
        return Store(self.path / name)

    def __str__(self):
        return f"gs://bucket{self.path}"

    __fspath__ = __str__

    def exists(self):
        return self.path.exists()

    def read_text(self):
        return self.path.read_text()

    def write_text(self, text):
        if Store.fails:
            raise RuntimeError("503 Service Unavailable")
        Store.written.append((self.path.name, len(text)))
        self.path.write_text(text)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.epath, "Path", lambda p: p if isinstance(p, Store) else Store(p))
    monkeypatch.setattr(Store, "written", [])
    return tmp_path


def test_an_object_store_gets_the_same_lines_without_appending(store):
    write(store, 0, 4)
    write(store, 2, 3)
    assert [line["step"] for line in read_metrics(store)] == [1, 2, 3]


def test_an_object_store_is_sent_a_few_lines_at_a_time(store, monkeypatch):
    monkeypatch.setattr(metrics, "_FOLD", 10)
    writer = MetricsWriter(store, 0)
    for step in range(1, 96):
        writer.write(step, {"loss": 1.0})
        # Nothing waits: a kill at any time loses no line.
        assert [line["step"] for line in read_metrics(store)] == list(range(1, step + 1))
    sizes = [size for name, size in Store.written if name == metrics.TAIL]
    assert max(sizes) <= 10 * 30
    assert sum(name == metrics.FILE for name, _ in Store.written) == 1 + 9
    # Killed between the two writes of a fold: the lines of the tail are in both files.
    tail = (store / metrics.TAIL).read_text()
    assert tail.count("\n") == 5
    (store / metrics.FILE).write_text((store / metrics.FILE).read_text() + tail)
    assert [line["step"] for line in read_metrics(store)] == list(range(1, 96))
    writer.close()
    assert (store / metrics.TAIL).read_text() == ""
    assert [line["step"] for line in read_metrics(store)] == list(range(1, 96))
    write(store, 93, 97)  # resumed
    assert [line["step"] for line in read_metrics(store)] == list(range(1, 98))


def test_lines_that_an_object_store_refused_are_reported_and_come_later(store, monkeypatch, capsys):
    writer = MetricsWriter(store, 0)
    writer.write(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(Store, "fails", True)
        writer.write(2, {"loss": 1.0})
    assert "the metrics of step 2 were not written: 503" in capsys.readouterr().err
    writer.write(3, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(store)] == [1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "fails", True)
        writer.close()
    assert "the last metrics were not written: 503" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(store)] == [1, 2, 3]


def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})

    def full(self, mode):
        (tmp_path / metrics.FILE).write_text((tmp_path / metrics.FILE).read_text() + '{"st')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(metrics.epath.Path(tmp_path)), "open", full)
        writer.write(2, {"loss": 1.0})
    assert "the metrics of step 2 were not written" in capsys.readouterr().err
    writer.write(3, {"loss": 1.0})
    writer.write(4, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 4]


def board_events(workdir):
    """Every event of TensorBoard's files in their order; the torn end of a file is left out."""
    pb = pytest.importorskip("tensorboardX.proto.event_pb2")
    events = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at + 8 <= len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            if at + length + 16 > len(content):
                break
            events.append(pb.Event.FromString(content[at + 12 : at + 12 + length]))
            at += length + 16
    return events


def board(workdir):
    """What TensorBoard shows: ``{(tag, step): value}``."""
    found = {}
    for event in board_events(workdir):
        if event.HasField("session_log"):
            found = {key: value for key, value in found.items() if key[1] < event.step}
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return found


def test_tensorboard_gets_the_same_numbers_under_train_and_eval(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(3, {"loss": 2.0, "eval_loss": 4.0})
    # Without a close: nothing waits for one.
    assert board(tmp_path) == {("train/loss", 3): 2.0, ("eval/loss", 3): 4.0}
    assert board_events(tmp_path)[0].file_version == "brain.Event:2"
    writer.close()


@pytest.mark.parametrize("saved", [0, 2])
def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path, saved):
    for start, loss in ((0, 1.0), (saved, 2.0)):
        writer = MetricsWriter(tmp_path, start)
        for step in range(start + 1, 4):
            writer.write(step, {"loss": loss})
            if loss == 2.0 and step == saved + 1:
                break
        writer.close()
    expected = [1.0] * saved + [2.0]
    assert board(tmp_path) == {("train/loss", n): loss for n, loss in enumerate(expected, 1)}


def test_a_tensorboard_that_cannot_be_written_does_not_hold_up_the_run(
    tmp_path, monkeypatch, capsys
):
    """A real write error: no file of this process may grow beyond 2 KiB, for a while."""
    writer = MetricsWriter(tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**11, hard))
    monkeypatch.setattr(writer._file, "write", lambda line: None)
    try:
        for step in range(1, 200):  # More than any queue would hold.
            writer.write(step, {"loss": float(step), "grad_norm": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    writer.write(200, {"loss": 200.0})
    writer.close()
    lost = capsys.readouterr().err.splitlines()
    assert 0 < len(lost) < 20 and "TensorBoard lacks step" in lost[0] and "large" in lost[0]
    found = board(tmp_path)
    assert all(found[tag, step] == step for tag, step in found if tag == "train/loss")
    assert len([tag for tag, _ in found if tag == "train/loss"]) == 200 - len(lost)


def test_closing_never_hides_the_error_that_ended_the_run(tmp_path, monkeypatch, capsys):
    from tensorboardX.record_writer import RecordWriter

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    monkeypatch.setattr(RecordWriter, "flush", full)
    with pytest.raises(SaveError, match="checkpoint"):
        try:
            raise SaveError("the checkpoint")
        finally:
            writer.close()
    assert "TensorBoard's file was not closed: " in capsys.readouterr().err
    files = list((tmp_path / "tensorboard").iterdir())
    MetricsWriter(tmp_path, 1).write(2, {"loss": 1.0})
    assert list((tmp_path / "tensorboard").iterdir()) == files  # No empty one is left.
    told = capsys.readouterr().err
    assert "TensorBoard's file was not opened: " in told and "TensorBoard lacks step 2: " in told


def test_console_prints_a_line_per_log_where_there_is_no_terminal():
    stream = io.StringIO()
    console = Console(100, 0, stream=stream)
    console.advance(5)
    console.log(5, {"loss": 1.5, "mfu": 0.25, "unknown": 1.0})
    console.log_evaluation(5, {"eval_loss": 1.25, "eval_bits_per_byte": 1.8})
    console.close()
    assert stream.getvalue().splitlines() == [
        "step   5/100  loss 1.5000  mfu 25.0%",
        "step   5/100  held out: loss 1.2500  bits/byte 1.800",
    ]


def test_console_draws_a_bar_on_a_terminal_and_quiet_prints_nothing():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    console = Console(10, 4, stream=terminal)
    console.advance(5)
    console.log(5, {"loss": 1.5})
    console.say("hello")
    console.close()
    assert "5/10" in terminal.getvalue() and "loss 1.5000" in terminal.getvalue()
    assert "hello" in terminal.getvalue()
    silent = Terminal()
    console = Console(10, 0, quiet=True, stream=silent)
    console.advance(1)
    console.log(1, {"loss": 1.0})
    console.close()
    assert silent.getvalue() == ""


def unread_pipe():
    """A stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed_stream():
    stream = io.StringIO()
    stream.close()
    return stream


class Interrupted(io.StringIO):
    def write(self, text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")


class LostTerminal(io.StringIO):
    def isatty(self):
        return True

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("make", [unread_pipe, closed_stream, Interrupted, LostTerminal])
def test_what_nobody_can_read_is_no_error(make):
    stream = make()
    tell("hello", stream)
    console = Console(10, 0, stream=stream)
    console.advance(1)
    console.log(1, {"loss": 1.0})
    console.log_evaluation(1, {"eval_loss": 1.0})
    console.close()
    stream.close()  # With nothing left in it that would raise now.


def test_stopwatch_leaves_pauses_out(monkeypatch):
    now = iter([0.0, 1.0, 100.0, 103.0, 103.0, 110.0, 110.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    watch.start()
    watch.pause()  # 1 s
    watch.start()
    assert watch.lap() == 1 + 3
    assert watch.lap() == 7


def test_the_picture_is_a_png_with_both_curves(tmp_path):
    lines = [{"step": s, "loss": 5.0 / s} for s in range(1, 200)]
    short = loss_picture(lines[:10], "toy")
    held_out = [{"step": s, "eval_loss": 6.0 / s, "eval_ema_loss": 5.5 / s} for s in (50, 100)]
    both = loss_picture(lines + held_out, "toy")
    for png in (short, both):
        assert png.startswith(b"\x89PNG")
    assert short != both
    write_loss_picture(tmp_path, "toy")
    assert not (tmp_path / "loss.png").exists()  # nothing to draw
    write(tmp_path, 0, 5)
    write_loss_picture(tmp_path, "toy")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("Some GPU of 2031", None),
    ],
)
def test_peak_by_device_kind(kind, peak):
    assert hardware.peak_of_kind(kind) == peak


def test_simulated_cpu_devices_share_one_measured_peak(monkeypatch):
    assert 1e8 < measured() < 1e15
    monkeypatch.setattr(hardware, "measured_matmul_flops", lambda device: 7.0)
    assert hardware.peak_flops(jax.devices()) == hardware.peak_flops(jax.devices()[:1]) == 7.0


def measured():
    return hardware.measured_matmul_flops(jax.devices()[0], size=128, repeats=2)
