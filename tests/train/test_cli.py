"""``python -m jaxalope.train``: flags, one-line errors, exit statuses."""

import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

import pytest
from absl import flags, logging

from jaxalope.model.checkpoint import CheckpointStore
from jaxalope.train import __main__ as cli

BIGRAM = str(pathlib.Path(__file__).parent / "bigram.py")


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(*args) -> (exit status, stdout, stderr)`` of the command line, in this process."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    verbosity = logging.get_verbosity()

    def run(*args):
        capsys.readouterr()
        flags.FLAGS.unparse_flags()
        names = ("config", "workdir", "set", "list", "dry_run", "topology", "compilation_cache")
        for name in names:
            flags.FLAGS[name].unparse()
        status = cli.main(flags.FLAGS(["jaxalope.train", *args]))
        return status, *capsys.readouterr()

    yield run
    logging.set_verbosity(verbosity)


def test_list_names_every_experiment_with_its_first_line(run):
    status, out, _ = run("--list")
    assert status == 0
    assert re.search(r"^tiny +\S.*$", out, re.M) and re.search(r"^demo +\S.*$", out, re.M)


@pytest.mark.parametrize(
    "args, words",
    [
        ([], ["--config", "--list"]),
        (["--config=tiny"], ["--workdir"]),
        (["--config=tinny", "--workdir=w"], ["config='tinny'", "did you mean 'tiny'"]),
        (["--config=tiny", "--workdir=w", "--set=train.stps=1"], ["stps", "steps"]),
        (["--config=tiny", "--workdir=w", "--set=train.steps=x"], ["train.steps", "int"]),
        (["--config=tiny", "--workdir=w", "train.steps=1"], ["unexpected 'train.steps=1'"]),
        (["--config=nothing.json", "--workdir=w"], ["no such file"]),
        ([f"--config={BIGRAM}", f"--workdir={'w' * 300}"], ["workdir='www", "File name too long"]),
        ([f"--config={BIGRAM}", "--workdir=/proc/w"], ["workdir='/proc/w'", "cannot be used"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(run, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*args)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_experiment_parameters_and_memory_and_makes_nothing(run, tmp_path):
    path = tmp_path / "run"
    status, out, _ = run(
        f"--config={BIGRAM}", f"--workdir={path}", "--dry_run", "--set=model.hidden_size=8"
    )
    assert status == 0 and not path.exists()
    text = out[: out.rindex("}") + 1]
    assert json.loads(text)["model"]["hidden_size"] == 8
    assert re.search(rf"parameters +{2 * 320 * 8:,}\n", out)
    # Eight data-parallel devices, each with all of the 20 KiB.
    assert re.search(r"parameters, a device +20\.0 KiB", out)
    assert re.search(r"a whole train step, a device +\d", out)


@pytest.mark.usefixtures("absent_slice")
def test_dry_run_compiles_for_a_slice_that_is_not_there(run):
    """Needs libtpu, which Linux developers have, and no TPU."""
    command = [f"--config={BIGRAM}", "--dry_run", "--topology=v5e:2x2"]
    status, out, _ = run(*command, "--set=mesh.fsdp=4", "--set=mesh.data=1")
    assert status == 0 and out.endswith("devices: 4 x TPU v5 lite\n")
    assert re.search(r"a whole train step, a device +\d", out)
    assert re.search(r"a step at the peak FLOP/s, seconds +\d", out)
    status, out, err = run(*command, "--set=model.hidden_size=20_000_000")
    assert status == 2 and err.count("\n") == 1
    assert "does not fit a device" in err and "raise train.accumulation or mesh.fsdp" in err


@pytest.mark.gpu_compile
@pytest.mark.usefixtures("absent_gpus")
def test_dry_run_compiles_for_gpus_that_are_not_there(run):
    command = [f"--config={BIGRAM}", "--dry_run", "--topology=h200:2x2"]
    status, out, _ = run(*command, "--set=mesh.fsdp=4", "--set=mesh.data=1")
    assert status == 0 and out.endswith("devices: 4 x NVIDIA H200\n")
    assert re.search(r"a step at the peak FLOP/s, seconds +\d", out)
    kernels = ("--config=tiny", *command[1:], "--set=model.kda_implementation=pallas_gpu")
    status, out, _ = run(*kernels, "--set=mesh.fsdp=4", "--set=mesh.data=1")
    assert status == 0 and out.endswith("devices: 4 x NVIDIA H200\n")
    status, out, err = run(*command, "--set=model.hidden_size=20_000_000")
    assert status == 2 and err.count("\n") == 1
    assert "does not fit a device" in err and "an NVIDIA H200 has 141.0 GiB" in err


@pytest.mark.usefixtures("absent_slice")
def test_dry_run_asks_for_every_host_of_the_slice(run):
    """What is wrong with the rows of another process than this one."""
    command = [f"--config={BIGRAM}", "--dry_run", "--topology=v5e:4x4", "--set=data.batch_size=64"]
    status, _, err = run(*command, "--set=data.num_streams=8")
    assert status == 2 and err.count("\n") == 1
    assert "num_streams=8 cannot be used" in err and "a multiple of 16 that divides" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e:2x2"], "needs --dry_run"),
        (["--topology=v9:2x2", "--dry_run"], "topology='v9:2x2' cannot be compiled for"),
        (["--topology=h200:x2", "--dry_run"], "topology='h200:x2' is not a GPU with a count"),
    ],
)
def test_a_slice_that_cannot_be_had_is_named(flags, message, run):
    status, _, err = run(f"--config={BIGRAM}", *flags)
    assert status == 2 and err.count("\n") == 1 and message in err


def test_runs_goes_on_and_says_when_complete(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = "runs/bigram"
    command = [f"--config={BIGRAM}", f"--workdir={path}", "--set=mesh.data=8"]
    assert run(*command, "--set=train.steps=4")[0] == 0
    status, _, err = run(*command)  # the file says 8
    assert status == 0 and "from step 4 of 8" in err
    assert "changed since the last run: train.steps: 4 -> 8" in err
    status, _, err = run(f"--workdir={path}")  # the workdir knows its experiment
    assert status == 0 and "is complete: 8 of 8 steps" in err
    status, _, err = run(*command, "--set=train.seed=1")
    assert status == 2 and err.count("\n") == 1
    assert "belongs to another experiment" in err and "train.seed: 0 -> 1" in err
    status, _, err = run(*command, "--set=train.steps=9", "--set=train.ema_decay=0.9")
    assert status == 2 and "train.ema_decay: None -> 0.9" in err and "steps" not in err


def process(*args, largest_file="unlimited"):
    """The command line in a process of its own, on one device; ``largest_file`` in KiB."""
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    limited = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "bash"]
    command = [*limited, sys.executable, "-m", "jaxalope.train", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_disk_full_is_one_line_status_1_and_the_last_checkpoint_survives(tmp_path):
    """A real write error: no file of the process may grow beyond 256 KiB."""
    path = tmp_path / "run"
    command = [
        f"--config={BIGRAM}",
        f"--workdir={path}",
        "--set=model.hidden_size=256",
        "--set=train.eval_every=none",
    ]
    done = process(*command, "--set=train.steps=4")
    assert done.returncode == 0, done.stderr
    done = process(*command, largest_file=256)
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "checkpoint of step 6" in error and "the last good one is step 4" in error
    assert str(path) in error and "Free space" in error
    assert "Traceback" not in done.stderr
    assert CheckpointStore(path / "checkpoints").steps() == [3, 4]
    assert not [p for p in (path / "checkpoints").iterdir() if "tmp" in p.name]
    done = process(*command)
    assert done.returncode == 0 and "from step 4 of 8" in done.stderr, done.stderr
