"""Every family's tiny experiment trains: its loss falls, alike on one device and on eight.

With Muon, which reads each parameter by its axes.
"""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalope.configs import Muon, get_experiment
from jaxalope.configs.overlay import overlay
from jaxalope.sharding import MeshConfig, make_mesh, use_mesh
from jaxalope.train.step import batch_sharding, init_state, make_train_step

_MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def _batch(experiment):
    """Rows of two documents, one of them padded."""
    shape = (experiment.data.batch_size, experiment.data.sequence_length)
    places = np.arange(shape[1])
    segments = np.ones(shape, np.int32)
    segments[:, 20:] = 2
    segments[0, -3:] = 0
    return {
        "tokens": np.random.default_rng(0).integers(0, 256, shape).astype(np.int32),
        "segment_ids": segments,
        "positions": np.where(segments == 2, places - 20, places).astype(np.int32),
    }


def _losses(experiment, batch, mesh, steps=4):
    graphdef, state = init_state(experiment, mesh)
    step = make_train_step(experiment, graphdef)
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(experiment, mesh))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize("name", ["gemma2_tiny", "gpt_neox_tiny"])
def test_the_loss_of_one_batch_falls_on_any_mesh(name):
    base = get_experiment(name)
    schedule = dataclasses.replace(base.schedule, warmup_steps=0, learning_rate=1e-2)
    experiment = dataclasses.replace(base, optimizer=Muon(), schedule=schedule, mesh=_MESH)
    batch = _batch(base)
    alone = _losses(experiment, batch, None)
    assert alone[-1] < alone[0] - 0.3
    mesh = make_mesh(_MESH)
    with use_mesh(mesh, experiment.rules):
        found = _losses(experiment, batch, mesh)
    np.testing.assert_allclose(found, alone, rtol=2e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["tiny", "gemma2_tiny", "gpt_neox_tiny", "llada_tiny", "calm_autoencoder_tiny", "calm_tiny"],
)
def test_rows_that_are_split_over_devices_give_the_same_loss(name):
    """Counts of segments, recurrences and chunks of vectors all run along the sequence."""
    mesh = MeshConfig(data=1, fsdp=2, context=2, tensor=2)
    settings = ["data.sequence_length=32", "data.batch_size=4", "data.num_streams=none"]
    settings += ["optimizer=adamw", "schedule.warmup_steps=0", "rules.seq=context"]
    if name == "calm_tiny":
        settings.append("objective.min_reconstruction=0")
    experiment = dataclasses.replace(overlay(get_experiment(name), settings), mesh=mesh)
    batch = _batch(experiment)
    alone = _losses(experiment, batch, None, steps=2)
    mesh = make_mesh(mesh)
    with use_mesh(mesh, experiment.rules):
        found = _losses(experiment, batch, mesh, steps=2)
    np.testing.assert_allclose(found, alone, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llada_tiny", "calm_autoencoder_tiny", "calm_tiny"])
def test_losses_are_the_same_where_jax_has_64_bit_numbers(name):
    """Draws and sums say their dtype: else noise would be another, or two would not mix."""
    settings = ["data.sequence_length=32", "data.batch_size=4", "data.num_streams=none"]
    settings += ["optimizer=adamw", "schedule.warmup_steps=0"]
    if name == "calm_tiny":
        settings.append("objective.min_reconstruction=0")
    experiment = overlay(get_experiment(name), settings)
    batch = _batch(experiment)
    plain = _losses(experiment, batch, None, steps=2)
    with jax.enable_x64(True):
        wide = _losses(experiment, batch, None, steps=2)
    np.testing.assert_allclose(wide, plain, rtol=1e-6)
