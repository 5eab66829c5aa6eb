"""Every family's tiny experiment trains: its loss falls, alike on one device and on eight.

With Muon, which reads each parameter by its axes.
"""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalope.configs import Muon, get_experiment
from jaxalope.sharding import MeshConfig, make_mesh, use_mesh
from jaxalope.train.step import batch_sharding, init_state, make_train_step

_MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def _losses(experiment, batch, mesh):
    graphdef, state = init_state(experiment, mesh)
    step = make_train_step(experiment, graphdef)
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(experiment, mesh))
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize("name", ["gemma2_tiny", "gpt_neox_tiny"])
def test_the_loss_of_one_batch_falls_on_any_mesh(name):
    base = get_experiment(name)
    schedule = dataclasses.replace(base.schedule, warmup_steps=0, learning_rate=1e-2)
    experiment = dataclasses.replace(base, optimizer=Muon(), schedule=schedule, mesh=_MESH)
    shape = (base.data.batch_size, base.data.sequence_length)
    segments = np.ones(shape, np.int32)
    segments[:, 20:] = 2
    segments[0, -3:] = 0
    batch = {
        "tokens": np.random.default_rng(0).integers(0, 320, shape).astype(np.int32),
        "segment_ids": segments,
        "positions": np.where(segments == 2, np.arange(32) - 20, np.arange(32)).astype(np.int32),
    }
    alone = _losses(experiment, batch, None)
    assert alone[-1] < alone[0] - 0.3
    mesh = make_mesh(_MESH)
    with use_mesh(mesh, experiment.rules):
        found = _losses(experiment, batch, mesh)
    np.testing.assert_allclose(found, alone, rtol=2e-3)
