"""Held-out numbers: the same however they are accumulated, also where something is drawn."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalope.configs.registry import get_experiment
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.sharding import MeshConfig, make_mesh, use_mesh
from jaxalope.train.evaluate import make_evaluation
from jaxalope.train.feed import Feed
from jaxalope.train.step import abstract_state, init_state, make_eval_step

# One that draws for the batch as a whole, and two that draw by the keys of its rows.
NAMES = ["llada_tiny", "calm_autoencoder_tiny", "calm_tiny"]


def evaluated(experiment, mesh=None):
    graphdef, state = init_state(experiment, mesh)
    tokenizer = load_tokenizer(experiment.data.tokenizer)
    feed = Feed(experiment, None, mesh)
    return make_evaluation(experiment, graphdef, tokenizer, feed)(state)


def experiment_of(name, accumulation=1):
    base = get_experiment(name)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, batch_size=8, sequence_length=32, num_streams=None),
        train=dataclasses.replace(base.train, accumulation=accumulation, eval_batches=2),
    )


@pytest.fixture(scope="module", params=NAMES)
def whole(request):
    """``(name, numbers)`` of an evaluation that takes a batch at once."""
    return request.param, evaluated(experiment_of(request.param))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(whole, accumulation):
    name, expected = whole
    found = evaluated(experiment_of(name, accumulation))
    assert found == pytest.approx(expected, rel=1e-5)


def test_nor_do_eight_devices(whole):
    name, expected = whole
    experiment = experiment_of(name, accumulation=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with use_mesh(mesh, experiment.rules):
        assert evaluated(experiment, mesh) == pytest.approx(expected, rel=1e-3)


def test_a_device_holds_one_part_of_a_batch_at_a_time():
    def needed(accumulation):
        experiment = experiment_of("llada_tiny", accumulation)
        graphdef, state = abstract_state(experiment)
        batch = {"tokens": jax.ShapeDtypeStruct((64, 64), np.int32)}
        program = make_eval_step(experiment, graphdef).lower(state.params, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert needed(8) < needed(1) / 4
