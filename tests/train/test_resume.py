"""Exact resume: a run that is killed and resumed has the very losses of one that was not."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxalope.train.metrics import read_metrics

STEPS = 150
# Both mixers and both kinds of feed-forward layer; few enough of them to compile quickly.
COMMAND = [
    sys.executable,
    "-m",
    "jaxalope.train",
    "--config=tiny",
    "--set=model.num_layers=2",
    "--set=model.kda_layers=1",
    "--set=model.full_attn_layers=2",
    f"--set=train.steps={STEPS}",
    "--set=train.log_every=1",
    "--set=train.eval_every=none",
    "--set=train.ema_decay=0.9",
    "--set=checkpoint.every=10",
]
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def start(workdir, command=COMMAND, *more):
    command = [*command, f"--workdir={workdir}", *more]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def finish(process, status=0):
    _, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return err


def wait_for(process, happened):
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def losses(workdir):
    return [
        (line["step"], line["loss"], line["grad_norm"], line["param_norm"])
        for line in read_metrics(workdir)
    ]


def logged(workdir, step):
    lines = read_metrics(workdir)
    return bool(lines) and lines[-1]["step"] >= step


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    finish(start(workdir))
    assert [step for step, *_ in losses(workdir)] == list(range(1, STEPS + 1))
    return losses(workdir)


def test_killed_by_9_and_resumed_is_bitwise_the_run_that_was_not(straight, tmp_path):
    process = start(tmp_path)
    saved = tmp_path / "checkpoints"
    wait_for(process, lambda: saved.exists() and any(p.name.isdigit() for p in saved.iterdir()))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    steps = [int(p.name) for p in saved.iterdir() if p.name.isdigit()]
    assert steps and max(steps) < STEPS, "the kill came too late to test anything"
    err = finish(start(tmp_path))
    assert f"from step {max(steps)} of {STEPS}" in err
    assert losses(tmp_path) == straight


def test_sigterm_saves_and_exits_0(straight, tmp_path):
    process = start(tmp_path)
    wait_for(process, lambda: logged(tmp_path, 3))
    process.send_signal(signal.SIGTERM)
    err = finish(process, status=0)
    assert "SIGTERM: finishing this step" in err and "stopped and saved after step" in err
    stopped = losses(tmp_path)[-1][0]
    assert stopped < STEPS, "the signal came too late to test anything"
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()
    assert losses(tmp_path) == straight[:stopped]


@pytest.mark.parametrize("gone", ["stderr", "both"])
def test_a_run_whose_reader_is_gone_stops_and_saves(tmp_path, gone):
    """Ctrl-C ends the ``tee`` behind a pipe first: then nobody reads what the run still says."""
    command = [*BIGRAM, f"--workdir={tmp_path}", "--set=train.steps=100000"]
    merged = subprocess.STDOUT if gone == "both" else subprocess.PIPE
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=merged, text=True
    )
    wait_for(process, lambda: logged(tmp_path, 3))
    (process.stdout if gone == "both" else process.stderr).close()
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 0
    stopped = losses(tmp_path)[-1][0]
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()


BIGRAM = [
    *COMMAND[:3],
    f"--config={pathlib.Path(__file__).parent / 'bigram.py'}",
    "--set=train.steps=300",
    "--set=train.eval_every=none",
    "--set=checkpoint.every=1000",
    "--set=schedule.learning_rate=1e-3",
]


def test_two_processes_stop_together_and_one_goes_on(tmp_path, free_port):
    """A signal to one process of two; the data streams then go to a single process."""
    workdir = tmp_path / "two"
    pair = [
        start(workdir, BIGRAM, f"--coordinator=localhost:{free_port}", "--num_processes=2", rank)
        for rank in ("--process_id=0", "--process_id=1")
    ]
    wait_for(pair[0], lambda: logged(workdir, 5))
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        assert "stopped and saved after step" in finish(process)
    stopped = losses(workdir)[-1][0]
    assert stopped < 300, "the signal came too late to test anything"
    documents = workdir / "checkpoints" / str(stopped) / "documents"
    assert {"data.0.json", "data.1.json"} <= {p.name for p in documents.iterdir()}

    finish(start(workdir, BIGRAM))
    finish(start(tmp_path / "one", BIGRAM))
    one, two = losses(tmp_path / "one"), losses(workdir)
    assert [step for step, *_ in two] == list(range(1, 301))
    np.testing.assert_allclose(two, one, rtol=1e-3)
