"""What a training checkpoint holds: the whole state, every process's streams, on any mesh."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxalope.configs.experiment import experiment_from_dict
from jaxalope.configs.overlay import overlay
from jaxalope.configs.registry import get_experiment
from jaxalope.data.documents import Document
from jaxalope.data.pipeline import Pipeline
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.data.train_tokenizer import train as train_tokenizer
from jaxalope.errors import InputError
from jaxalope.model import checkpoint
from jaxalope.sharding import make_mesh
from jaxalope.train.checkpoints import TrainCheckpoints
from jaxalope.train.step import abstract_state, init_state
from jaxalope.train.workdir import open_workdir


@pytest.fixture(scope="module")
def bigram():
    return get_experiment(str(pathlib.Path(__file__).parent / "bigram.py"))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ema", ["none", "0.9"])
def test_the_whole_state_comes_back_also_onto_a_mesh(bigram, tmp_path, optimizer, ema):
    experiment = overlay(
        bigram, [f"optimizer={optimizer}", f"train.ema_decay={ema}", "mesh.data=4", "mesh.fsdp=2"]
    )
    workdir, _, _ = open_workdir(tmp_path, experiment)
    state = init_state(experiment)[1]
    state = dataclasses.replace(state, step=state.step + 7)
    data_state = {"step": 7, "layout": {}, "streams": {"0": [1]}}
    with TrainCheckpoints(workdir, experiment) as checkpoints:
        assert checkpoints.restore(abstract_state(experiment)[1]) is None
        checkpoints.save(7, state, data_state)
        assert checkpoints.latest() == 7
        restored, data = checkpoints.restore(abstract_state(experiment)[1])
        assert_same(restored, state)
        assert data == data_state

        mesh = make_mesh(experiment.mesh)
        wanted = abstract_state(experiment, mesh)[1]
        spread, _ = checkpoints.restore(wanted)
        assert_same(spread, state)
        for x, want in zip(jax.tree.leaves(spread), jax.tree.leaves(wanted), strict=True):
            assert x.sharding == want.sharding
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread.params))
    assert (workdir / "checkpoints" / "7" / "documents" / "tokenizer").exists()


def test_data_states_of_several_processes_are_stored_apart_and_restored_by_one(
    bigram, tmp_path, monkeypatch
):
    """The second process writes its own document beside that of the first."""
    workdir, _, _ = open_workdir(tmp_path, bigram)
    tokenizer = load_tokenizer("bytes")
    halves = [range(0, 4)], [range(4, 8)]
    pipelines = [Pipeline(bigram.data, tokenizer, rows=rows) for rows in halves]
    whole = Pipeline(bigram.data, tokenizer)
    for _ in range(3):
        parts = [next(p)["tokens"] for p in pipelines]
        np.testing.assert_array_equal(np.concatenate(parts), next(whole)["tokens"])

    state = init_state(bigram)[1]
    with TrainCheckpoints(workdir, bigram) as checkpoints:
        checkpoints.save(3, state, pipelines[0].state())
        checkpoints.latest()
        # What Orbax and a second process would do: the same directory, another document.
        documents = workdir / "checkpoints" / "3" / "documents"
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        writer = checkpoint._Documents({"experiment": {}}, {"data": pipelines[1].state()}, {})
        monkeypatch.undo()
        assert list(writer._files) == ["data.1.json"]
        (documents / "data.1.json").write_bytes(writer._files["data.1.json"])
        header = (documents / "checkpoint.json").read_text()
        (documents / "checkpoint.json").write_text(
            header.replace('"processes": 1', '"processes": 2')
        )
        _, data = checkpoints.restore(abstract_state(bigram)[1])
    resumed = Pipeline(bigram.data, tokenizer)
    resumed.restore(data)
    np.testing.assert_array_equal(next(resumed)["tokens"], next(whole)["tokens"])
    for pipeline in (*pipelines, whole, resumed):
        pipeline.close()


@pytest.fixture
def failed(bigram, tmp_path):
    """The workdir of a run that ended before it saved anything, and its experiment."""
    experiment = overlay(bigram, ["data.sources=no/such/file", "train.steps=9"])
    open_workdir(tmp_path, experiment)
    (tmp_path / "generation.json").write_text("{}")
    return tmp_path, experiment


def saved_experiment(workdir):
    return experiment_from_dict(json.loads((workdir / "experiment.json").read_text()))


def test_a_workdir_without_a_checkpoint_is_taken_over_by_the_corrected_command(bigram, failed):
    workdir, _ = failed
    inode = (workdir / "tokenizer").stat().st_ino
    _, _, notes = open_workdir(workdir, bigram)
    assert len(notes) == 1 and "this experiment's from now on" in notes[0]
    assert "data.sources" in notes[0] and "train.steps: 9 -> 8" in notes[0]
    assert saved_experiment(workdir) == bigram
    assert (workdir / "tokenizer").stat().st_ino == inode
    assert not (workdir / "generation.json").exists()
    assert open_workdir(workdir, bigram)[2] == []


def test_another_tokenizer_replaces_that_of_a_run_which_saved_nothing(bigram, failed, tmp_path):
    workdir, _ = failed
    assert load_tokenizer(workdir / "tokenizer").vocab_size == 320
    small = train_tokenizer([[Document("a", "hello world")]], 270)
    small.save(tmp_path / "small")
    experiment = overlay(bigram, [f"data.tokenizer={tmp_path / 'small'}"])
    _, tokenizer, _ = open_workdir(workdir, experiment)
    assert tokenizer.vocab_size == small.vocab_size
    assert load_tokenizer(workdir / "tokenizer").vocab_size == small.vocab_size
    # And is kept from now on, wherever it came from.
    shutil.rmtree(tmp_path / "small")
    assert open_workdir(workdir, experiment)[1].vocab_size == small.vocab_size


@pytest.mark.parametrize("left", ["4", "4.unreadable", "4.orbax-checkpoint-tmp-1", "4.saving"])
def test_whatever_was_saved_keeps_the_workdir(bigram, failed, left):
    workdir, experiment = failed
    (workdir / "checkpoints" / left).mkdir(parents=True)
    with pytest.raises(InputError, match=r"belongs to another experiment.*data\.sources"):
        open_workdir(workdir, bigram)
    assert saved_experiment(workdir) == experiment


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EROFS, InputError, "workdir=.* cannot be used as a folder.*Read-only.*Name another"),
        (errno.ENOSPC, OSError, "No space left"),
        (errno.EIO, OSError, "Input/output"),
    ],
)
def test_a_folder_that_cannot_be_written_is_wrong_input_and_a_full_disk_is_not(
    bigram, tmp_path, monkeypatch, number, kind, words
):
    def mkdir(self, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(type(checkpoint.epath.Path(tmp_path)), "mkdir", mkdir)
    with pytest.raises(kind, match=words):
        open_workdir(tmp_path / "run", bigram)


def test_a_tokenizer_that_may_not_be_read_is_not_called_a_workdir(bigram, tmp_path, monkeypatch):
    def read_bytes(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    (tmp_path / "tokenizer.json").write_text("{}")
    experiment = overlay(bigram, [f"data.tokenizer={tmp_path / 'tokenizer.json'}"])
    monkeypatch.setattr(type(checkpoint.epath.Path(tmp_path)), "read_bytes", read_bytes)
    with pytest.raises(InputError, match=r"^data\.tokenizer=.* cannot be read.*Permission"):
        open_workdir(tmp_path / "run", experiment)
