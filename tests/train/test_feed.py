"""Whose rows are whose: on slices of several hosts, whatever the order of their devices."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxalope.configs.overlay import overlay
from jaxalope.configs.registry import get_experiment
from jaxalope.data.pipeline import Pipeline
from jaxalope.data.tokenizers import ByteTokenizer
from jaxalope.errors import InputError
from jaxalope.sharding import MESH_AXES, MeshConfig, make_mesh
from jaxalope.train.feed import Feed, data_rows, rows_by_process


@pytest.fixture(scope="module")
def bigram():
    """Sixty-four rows, a stream each."""
    experiment = get_experiment(str(pathlib.Path(__file__).parent / "bigram.py"))
    return overlay(experiment, ["data.batch_size=64"])


SIZES = {
    "default": {},
    "fsdp": {"data": 1, "fsdp": -1},
    "data and fsdp": {"data": 2, "fsdp": -1},
    "fsdp and tensor": {"data": 1, "fsdp": -1, "tensor": 2},
    "tensor over hosts": {"data": 2, "tensor": 8},
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_the_hosts_of_a_slice_feed_every_row(topology, sizes, bigram, absent_slice):
    """Once, but where hosts split the model between them; in as few blocks as there can be."""
    mesh = make_mesh(MeshConfig(**SIZES[sizes]), absent_slice(topology))
    rows = rows_by_process(bigram, mesh)
    assert sorted(rows) == [0, 1, 2, 3]
    for blocks in rows.values():
        assert all(a.stop < b.start for a, b in itertools.pairwise(blocks))
    fed = [row for blocks in rows.values() for block in blocks for row in block]
    times = np.bincount(fed, minlength=64)
    assert times.size == 64 and len(set(times)) == 1
    assert (times > 1 if sizes == "tensor over hosts" else times == 1).all()


def test_a_host_may_have_rows_apart(bigram, absent_slice):
    """Devices lie as the network of the slice does: 2 x 2 chips are no neighbours on an axis."""
    rows = rows_by_process(bigram, make_mesh(MeshConfig(), absent_slice("v5e:4x4")))
    assert rows[0] == (range(0, 8), range(24, 28), range(60, 64))


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
def test_batches_are_the_same_however_a_slice_deals_their_rows(topology, bigram, absent_slice):
    rows = rows_by_process(bigram, make_mesh(MeshConfig(), absent_slice(topology)))
    with Pipeline(bigram.data, ByteTokenizer()) as whole:
        expected = [next(whole) for _ in range(3)]
    for blocks in rows.values():
        numbers = list(itertools.chain(*blocks))
        with Pipeline(bigram.data, ByteTokenizer(), rows=blocks) as part:
            for batch in expected:
                own = next(part)
                for name in batch:
                    np.testing.assert_array_equal(own[name], batch[name][numbers])


def test_streams_too_long_for_the_blocks_are_named(bigram, absent_slice):
    mesh = make_mesh(MeshConfig(), absent_slice("v5e:4x4"))
    few = dataclasses.replace(bigram, data=dataclasses.replace(bigram.data, num_streams=8))
    with pytest.raises(InputError, match=r"data: num_streams=8 .* multiple of 16 that divides"):
        rows_by_process(few, mesh)
    enough = dataclasses.replace(bigram, data=dataclasses.replace(bigram.data, num_streams=16))
    assert rows_by_process(enough, mesh) == rows_by_process(bigram, mesh)


def test_one_process_feeds_all_rows_as_one_block(bigram):
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    assert data_rows(bigram, mesh) == data_rows(bigram, None) == (range(64),)


@pytest.mark.parametrize("shape", [(8, 1, 1, 1, 1), (2, 1, 1, 2, 2), (1, 1, 1, 1, 8)])
def test_every_device_gets_its_rows(shape, bigram):
    """Also where devices are in another order, and where they split rows in their length."""
    experiment = overlay(bigram, ["rules.seq=context"])
    devices = np.random.default_rng(0).permutation(np.array(jax.devices())).reshape(shape)
    batch = {"tokens": np.arange(64 * 32, dtype=np.int32).reshape(64, 32)}
    placed = Feed(experiment, None, Mesh(devices, MESH_AXES)).put(batch)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    parts = shape[0] * shape[3]
    assert all(s.data.size == batch["tokens"].size // parts for s in placed.addressable_shards)


PROCESS = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
from jaxalope.configs.overlay import overlay
from jaxalope.configs.registry import get_experiment
from jaxalope.sharding import MESH_AXES
from jaxalope.sharding.distributed import start
from jaxalope.train.feed import Feed

rank, coordinator, bigram = sys.argv[1:]
start(coordinator, 2, int(rank))
experiment = overlay(get_experiment(bigram), ["data.batch_size=8"])
whole = np.arange(8 * 32, dtype=np.int32).reshape(8, 32)
devices = np.array(jax.devices())
assert [d.process_index for d in devices] == [0, 0, 1, 1]
# Each process's rows apart; blocks of a process; rows that both have, as they split the model.
for order, shape in (([0, 2, 1, 3], (4, 1)), ([2, 3, 0, 1], (4, 1)), ([0, 2, 1, 3], (2, 2))):
    mesh = Mesh(devices[order].reshape(shape[0], 1, 1, 1, shape[1]), MESH_AXES)
    feed = Feed(experiment, None, mesh)
    numbers = [row for block in feed.rows for row in block]
    placed = feed.put({"tokens": whole[numbers]})["tokens"]
    assert placed.shape == whole.shape
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    print(len(feed.rows), len(numbers))
"""


def test_two_processes_put_their_rows_where_they_belong(free_port):
    bigram = str(pathlib.Path(__file__).parent / "bigram.py")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), f"localhost:{free_port}", bigram],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in pair:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.split("\n")[:3] == ["2 4", "1 4", "1 8"]
