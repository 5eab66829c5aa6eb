"""Exact resume: a run that is killed and resumed has the very losses of one that was not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxalope.train.metrics import read_metrics

STEPS = 60
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


def start(workdir):
    return subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


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
    wait_for(process, lambda: logged(tmp_path, 15))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
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
