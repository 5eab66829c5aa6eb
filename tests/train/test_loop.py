"""The train loop in one process: the workdir, resuming, stopping, refusing, other meshes."""

import dataclasses
import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from jaxalope.configs.overlay import overlay
from jaxalope.configs.registry import get_experiment
from jaxalope.data.config import SourceConfig
from jaxalope.errors import InputError
from jaxalope.model import checkpoint
from jaxalope.train import feed, loop, workdir
from jaxalope.train.feed import Feed
from jaxalope.train.ledger import Ledger, NonFiniteLoss
from jaxalope.train.loop import train
from jaxalope.train.metrics import read_metrics

ONE = jax.devices()[:1]


@pytest.fixture(scope="session")
def bigram():
    return get_experiment(str(pathlib.Path(__file__).parent / "bigram.py"))


@pytest.fixture(scope="session")
def straight(bigram, tmp_path_factory):
    """A run of 8 steps without interruption: ``(workdir, result)``."""
    path = tmp_path_factory.mktemp("straight")
    return path, train(bigram, path, devices=ONE, quiet=True)


def losses(path, name="loss"):
    return {line["step"]: line[name] for line in read_metrics(path) if name in line}


def assert_same_params(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_run_leaves_everything_in_its_workdir(bigram, straight):
    path, result = straight
    assert (result.reason, result.step) == ("complete", 8)
    names = {p.name for p in path.iterdir()}
    assert names == {
        "experiment.json",
        "tokenizer",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "loss.png",
    }
    assert sorted(losses(path)) == list(range(1, 9))
    assert sorted(losses(path, "eval_loss")) == [4, 8]
    last = result.metrics
    assert last["loss"] < losses(path)[1]
    assert last["tokens_per_second"] > 0 and 0 < last["mfu"] < 10
    assert last["eval_perplexity"] == pytest.approx(np.exp(last["eval_nll"]))
    assert last["eval_bits_per_byte"] == pytest.approx(last["eval_nll"] / np.log(2))
    # 3 and 6 by cadence, 8 as the last step.
    assert checkpoint.CheckpointStore(path / "checkpoints").steps() == [3, 6, 8]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), result.state.params)
    assert_same_params(checkpoint.restore_params(path, shapes), result.state.params)
    assert checkpoint.read_document(path, "experiment")["name"] == bigram.name
    assert (checkpoint.document_dir(path) / "tokenizer").is_dir()


def test_a_complete_run_is_not_run_again(bigram, straight, capsys):
    path, result = straight
    before = (path / "metrics.jsonl").read_text()
    again = train(bigram, path, devices=ONE)
    assert (again.reason, again.step) == ("already complete", 8)
    assert "is complete: 8 of 8 steps" in capsys.readouterr().err
    assert_same_params(again.state, result.state)
    assert (path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_resuming_is_bitwise(
    bigram, straight, tmp_path, monkeypatch, capsys, number
):
    real, calls = Feed.__next__, []

    def interrupted(self):
        calls.append(None)
        if len(calls) == 5:  # the host is making batch 5 while step 4 runs
            os.kill(os.getpid(), number)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(feed.Feed, "__next__", interrupted)
        stopped = train(bigram, tmp_path, devices=ONE)
    assert (stopped.reason, stopped.step) == (number.name, 5)
    assert signal.getsignal(number) not in (None, loop.StopRequest)
    assert "finishing this step" in capsys.readouterr().err
    assert checkpoint.CheckpointStore(tmp_path / "checkpoints").steps()[-1] == 5
    resumed = train(bigram, tmp_path, devices=ONE)
    assert "from step 5 of 8" in capsys.readouterr().err
    path, result = straight
    assert resumed.step == 8
    assert losses(tmp_path) == losses(path)
    assert losses(tmp_path, "eval_loss") == losses(path, "eval_loss")
    assert_same_params(resumed.state, result.state)


@pytest.fixture
def usual_interrupt():
    """Python's own handler, also where the shell that started the tests ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_is_not_caught(usual_interrupt):
    with loop.StopRequest() as stop:
        before = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT" and stop.agreed(meeting=False)
        assert signal.getsignal(signal.SIGINT) is not before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_lines_after_the_last_checkpoint_are_not_doubled(bigram, straight, tmp_path, monkeypatch):
    """A crash at step 5, after the checkpoint of step 3: steps 4 and 5 are run and logged again."""

    def crash(self):
        if self._pipeline.step == 5:
            raise RuntimeError("crash")
        return real(self)

    real = Feed.__next__
    with monkeypatch.context() as patch:
        patch.setattr(feed.Feed, "__next__", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(bigram, tmp_path, devices=ONE, quiet=True)
    assert max(losses(tmp_path)) > 3
    train(bigram, tmp_path, devices=ONE, quiet=True)
    steps = [line["step"] for line in read_metrics(tmp_path) if "loss" in line]
    assert steps == list(range(1, 9))
    assert losses(tmp_path) == losses(straight[0])


def test_a_truncated_checkpoint_falls_back_and_the_run_goes_on(bigram, straight, tmp_path):
    half = dataclasses.replace(bigram, train=dataclasses.replace(bigram.train, steps=6))
    train(half, tmp_path, devices=ONE, quiet=True)
    for path in (tmp_path / "checkpoints" / "6" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 1:
            os.truncate(path, path.stat().st_size // 2)
    with pytest.warns(UserWarning, match="step 6 .* cannot be read .* step 3 instead"):
        result = train(bigram, tmp_path, devices=ONE, quiet=True)
    assert_same_params(result.state, straight[1].state)
    assert losses(tmp_path) == losses(straight[0])
    assert (tmp_path / "checkpoints" / "6.unreadable").is_dir()


def test_another_experiment_is_refused_with_every_field_that_differs(bigram, straight):
    path, _ = straight
    text = (path / "experiment.json").read_text()
    other = overlay(bigram, ["model.hidden_size=8", "optimizer.weight_decay=1"])
    with pytest.raises(InputError) as error:
        train(other, path, devices=ONE, quiet=True)
    assert "model.hidden_size: 16 -> 8" in str(error.value)
    assert "optimizer.weight_decay: 0.1 -> 1.0" in str(error.value)
    with pytest.raises(InputError, match=r"train.steps: 8 -> 7"):
        train(overlay(bigram, ["train.steps=7"]), path, devices=ONE, quiet=True)
    assert (path / "experiment.json").read_text() == text


def test_what_may_change_may_change_and_is_said(bigram, tmp_path, capsys):
    train(overlay(bigram, ["train.steps=2"]), tmp_path, devices=ONE)
    changes = ["train.steps=3", "train.log_every=2", "checkpoint.keep_last=1", "mesh.fsdp=1"]
    result = train(overlay(bigram, changes), tmp_path, devices=ONE)
    assert result.step == 3
    told = capsys.readouterr().err
    assert "changed since the last run: train.steps: 2 -> 3" in told
    assert json.loads((tmp_path / "experiment.json").read_text())["train"]["steps"] == 3


def test_the_fields_that_may_change_exist(bigram):
    """A renamed field must not silently drop out of the list."""
    from jaxalope.configs.overlay import paths

    known = set(paths(get_experiment("tiny")))
    for field in ("data.sources", "data.eval_sources"):
        known |= {f"{field}.{name}" for name in paths(SourceConfig())}
    assert set(workdir.MAY_CHANGE) <= known
    assert workdir.may_change("data.sources.12.skip_bad")
    assert not workdir.may_change("data.sources.12.path")


def test_checkpoints_without_an_experiment_are_not_taken_over(bigram, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"has checkpoints but no experiment\.json"):
        train(bigram, tmp_path, devices=ONE, quiet=True)
    (tmp_path / "experiment.json").write_text('{"name": ')
    with pytest.raises(InputError, match=r"experiment.json cannot be read"):
        train(bigram, tmp_path, devices=ONE, quiet=True)


def poisoned(bigram, folder):
    """An experiment over small files, one of which holds the poisoned byte."""
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"This is document number {i}. " * 20)
    bad = folder / "01.txt"
    bad.write_text(bad.read_text() + "\x07")
    return overlay(
        bigram,
        [
            "model.poison=7",
            f"data.sources.0.path={folder}",
            "data.holdout_fraction=0",
            "data.shuffle=false",
            "data.batch_size=2",
            "train.eval_every=none",
            "train.log_every=4",
            "checkpoint.every=2",
            "train.steps=40",
        ],
    )


def test_a_loss_that_is_no_number_names_step_batch_and_checkpoint(bigram, tmp_path):
    experiment = poisoned(bigram, tmp_path / "corpus")
    path = tmp_path / "run"
    with pytest.raises(NonFiniteLoss) as error:
        train(experiment, path, devices=ONE, quiet=True)
    message = str(error.value)
    assert "01.txt" in message and "the loss is nan" in message
    step = int(message.split("step ")[1].split(":")[0])
    good = (step - 1) // 2 * 2
    assert good >= 2
    assert f"the last good checkpoint, step {good} in {path}, is untouched" in message
    assert f"repeats steps {good + 1} to {step} exactly" in message
    for remedy in (f"--set train.skip_steps={step} ", "schedule.learning_rate", "train.clip_norm"):
        assert remedy in message
    assert checkpoint.CheckpointStore(path / "checkpoints").steps()[-1] == good
    assert max(losses(path)) < step
    with pytest.raises(NonFiniteLoss, match=f"^step {step}:"):  # and again, from the checkpoint
        train(experiment, path, devices=ONE, quiet=True)


def test_a_batch_that_is_not_finite_can_be_passed_over(bigram, tmp_path, capsys):
    """The remedy that the message names: the run goes on, with every other batch in its place."""
    experiment = poisoned(bigram, tmp_path / "corpus")
    path = tmp_path / "run"
    skip: list[int] = []
    for _ in range(8):  # The poisoned document spans a few batches.
        changes = ["train.steps=40", f"train.skip_steps=({','.join(map(str, skip))})"]
        try:
            result = train(overlay(experiment, changes), path, devices=ONE)
            break
        except NonFiniteLoss as error:
            skip.append(int(str(error).split("step ")[1].split(":")[0]))
            assert f"train.skip_steps={','.join(map(str, skip))} " in str(error)
    assert result.step == 40 and skip
    told = capsys.readouterr().err
    assert "changed since the last run: train.skip_steps: " in told
    lines = {line["step"]: line for line in read_metrics(path)}
    assert all(lines[step] == {"step": step, "skipped": 1.0} | speed(lines[step]) for step in skip)
    assert f"step {skip[0]:>2}/40  skipped" in told
    saved = json.loads((path / "experiment.json").read_text())
    assert saved["train"]["skip_steps"] == skip
    # Beside them, the rate is that of the step, as if there had been no skipping.
    assert int(result.state.opt_state.count) == 40
    assert int(result.state.opt_state.adamw.count) == 40 - len(skip)


def speed(line):
    return {k: v for k, v in line.items() if "second" in k or k == "mfu"}


def test_a_skipped_step_changes_nothing_but_the_count(bigram, straight, tmp_path):
    """Steps before it are those of the run without; what it leaves, a checkpoint must hold."""
    skipping = overlay(bigram, ["train.skip_steps=4", "train.eval_every=none"])
    stopped = train(overlay(skipping, ["train.steps=4"]), tmp_path, devices=ONE, quiet=True)
    upto = overlay(bigram, ["train.steps=3", "train.eval_every=none"])
    before = train(upto, tmp_path / "before", devices=ONE, quiet=True)
    assert_same_params(stopped.state.params, before.state.params)
    assert_same_params(stopped.state.opt_state.adamw, before.state.opt_state.adamw)
    assert int(stopped.state.step) == int(before.state.step) + 1 == 4
    expected = losses(straight[0])
    assert losses(tmp_path) == {step: expected[step] for step in (1, 2, 3)}
    train(skipping, tmp_path, devices=ONE, quiet=True)
    train(skipping, tmp_path / "whole", devices=ONE, quiet=True)
    assert losses(tmp_path) == losses(tmp_path / "whole")
    assert sorted(losses(tmp_path)) == [1, 2, 3, 5, 6, 7, 8]
    sharded = overlay(skipping, ["mesh.data=4", "mesh.fsdp=2"])
    train(sharded, tmp_path / "sharded", quiet=True)
    for step, loss in losses(tmp_path / "sharded").items():
        assert loss == pytest.approx(losses(tmp_path)[step], rel=1e-5)


def test_the_schedule_and_clipping_may_change_between_two_runs(bigram, straight, tmp_path, capsys):
    first = overlay(bigram, ["train.steps=4"])
    train(first, tmp_path, devices=ONE)
    changes = ["schedule=cosine", "schedule.learning_rate=0.001", "train.clip_norm=0.5"]
    result = train(overlay(bigram, changes), tmp_path, devices=ONE)
    assert result.step == 8
    told = capsys.readouterr().err
    assert "schedule.learning_rate: 0.03 -> 0.001" in told and "train.clip_norm: 1.0 -> 0.5" in told
    rates = losses(tmp_path, "lr")
    assert rates[4] == losses(straight[0], "lr")[4] and rates[5] < 0.001
    saved = json.loads((tmp_path / "experiment.json").read_text())
    assert (saved["schedule"]["kind"], saved["train"]["clip_norm"]) == ("cosine", 0.5)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused_at_once(bigram, tmp_path):
    with pytest.raises(InputError, match=r"data.tokenizer='bytes' has \d+ ids.*model.vocab_size=9"):
        train(overlay(bigram, ["model.vocab_size=9"]), tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()


def test_a_token_outside_the_vocabulary_is_named_with_its_batch(bigram):
    class Pipeline:
        def __init__(self, token):
            self.token = token

        def __next__(self):
            return {"tokens": np.array([[1, self.token]], np.int32)}

        def describe(self):
            return "batch 3; row 0: a.txt"

    for token in (320, -1):
        with pytest.raises(InputError, match=rf"token id {token} .*=320, in batch 3; row 0: a.txt"):
            next(Feed(bigram, Pipeline(token), None))


def test_a_batch_that_does_not_divide_is_refused_by_name(bigram, tmp_path):
    with pytest.raises(InputError, match=r"data.batch_size=4 .*mesh axes data=8"):
        train(overlay(bigram, ["data.batch_size=4"]), tmp_path / "a", quiet=True)
    with pytest.raises(InputError, match=r"mesh sizes .* 8 are"):
        train(overlay(bigram, ["mesh.fsdp=3"]), tmp_path / "b", quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_is_refused(bigram, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a folder"):
        train(bigram, tmp_path / "file", devices=ONE, quiet=True)


@pytest.mark.parametrize("mesh", [["mesh.data=4", "mesh.fsdp=2"], ["mesh.data=2", "mesh.tensor=4"]])
def test_eight_devices_equal_one_and_a_run_moves_between_them(bigram, straight, tmp_path, mesh):
    sharded = overlay(bigram, [*mesh, "train.steps=5"])
    train(sharded, tmp_path, quiet=True)
    expected = losses(straight[0])
    for step, loss in losses(tmp_path).items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    result = train(bigram, tmp_path, devices=ONE, quiet=True)  # onto one device
    assert result.step == 8
    assert_same_params(result.state.params, straight[1].state.params, rtol=1e-4, atol=1e-5)


def test_evaluation_reads_the_same_rows_however_they_are_accumulated(bigram, straight, tmp_path):
    accumulated = overlay(bigram, ["train.accumulation=4", "train.ema_decay=0.5"])
    result = train(accumulated, tmp_path, devices=ONE, quiet=True)
    for step, loss in losses(tmp_path, "eval_loss").items():
        assert loss == pytest.approx(losses(straight[0], "eval_loss")[step], rel=1e-4)
    assert result.metrics["eval_ema_loss"] != result.metrics["eval_loss"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), result.state.ema)
    ema = checkpoint.restore_params(tmp_path, shapes, ema=True)
    assert_same_params(ema, result.state.ema)


def test_chosen_steps_are_profiled(bigram, tmp_path):
    traced = overlay(bigram, ["train.steps=3", "train.profile_steps=1,1", "train.eval_every=none"])
    train(traced, tmp_path, devices=ONE, quiet=True)
    assert any(p.stat().st_size for p in (tmp_path / "profile").rglob("*") if p.is_file())


def test_numbers_are_read_one_step_late_and_only_where_due(bigram, monkeypatch):
    """Reading a number waits for its step: in between, the host must be free to run ahead."""
    fetched, reported = [], []
    real = jax.device_get

    def device_get(tree):
        fetched.append(len(jax.tree.leaves(tree)))
        return real(tree)

    monkeypatch.setattr(jax, "device_get", device_get)
    experiment = overlay(bigram, ["train.steps=100", "train.log_every=3"])
    ledger = Ledger(experiment, lambda step, _: reported.append(step), None, None)
    for step in range(1, 9):
        ledger.add(step, {"loss": np.float32(1), "finite": np.bool_(True)})
        assert reported == [s for s in (3, 6) if s < step]
        assert bool(fetched) == (step in (4, 7))
        fetched.clear()
    ledger.settle()
    assert reported == [3, 6]
