"""What a training checkpoint holds: the whole state, every process's streams, on any mesh."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from jaxalope.configs.overlay import overlay
from jaxalope.configs.registry import get_experiment
from jaxalope.data.pipeline import Pipeline
from jaxalope.data.tokenizers import load_tokenizer
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
