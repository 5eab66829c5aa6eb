"""From the host's batches to the devices: whose rows, checked ids, the right sharding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ..configs.experiment import Experiment
from ..data.pipeline import Pipeline
from ..errors import InputError
from .step import batch_sharding

DeviceBatch = dict[str, Int[Array, "B T"]]


def data_share(experiment: Experiment, mesh: Mesh | None) -> tuple[int, int]:
    """``(index, count)``: which of how many equal blocks of a batch's rows this process feeds.

    Usually a block a process; processes that only split the model between them share one.

    Raises:
        InputError: the rows of a process are not one block.
    """
    if mesh is None:
        return 0, 1
    shape = (experiment.data.batch_size, experiment.data.sequence_length)
    places = batch_sharding(experiment, mesh).addressable_devices_indices_map(shape)
    blocks = sorted({rows.indices(shape[0])[:2] for rows, _ in places.values()})
    begin, end = blocks[0][0], blocks[-1][1]
    size = end - begin
    joined = all(a[1] == b[0] for a, b in itertools.pairwise(blocks))
    if not joined or shape[0] % size or begin % size:
        raise InputError(
            f"mesh: process {jax.process_index()} holds the rows {blocks} of a batch, which are "
            "not one block; make mesh.data x mesh.fsdp a multiple of the number of processes, or "
            "a divisor of it"
        )
    return begin // size, shape[0] // size


class Feed:
    """Training batches of all processes as device arrays.

    Args:
        experiment: gives the vocabulary and the placement.
        pipeline: of this process's rows.
        mesh: where batches go; None is one device.
    """

    def __init__(self, experiment: Experiment, pipeline: Pipeline, mesh: Mesh | None):
        self._pipeline = pipeline
        self._vocab_size = experiment.model.vocab_size
        self._sharding = None if mesh is None else batch_sharding(experiment, mesh)
        self._count = data_share(experiment, mesh)[1]

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        batch = next(self._pipeline)
        tokens = batch["tokens"]
        if tokens.max() >= self._vocab_size or tokens.min() < 0:
            worst = int(tokens.max() if tokens.max() >= self._vocab_size else tokens.min())
            raise InputError(
                f"token id {worst} is outside model.vocab_size={self._vocab_size}, in "
                f"{self._pipeline.describe()}; set model.vocab_size higher, or use the tokenizer "
                "that the data was made with"
            )
        return self.put(batch)

    def put(self, batch: Mapping[str, np.ndarray]) -> DeviceBatch:
        """This process's rows ``[b, T]`` as its part of a batch ``[B, T]`` on the devices."""
        if self._sharding is None:
            return jax.device_put(dict(batch))
        return {
            name: jax.make_array_from_process_local_data(
                self._sharding, rows, (rows.shape[0] * self._count, *rows.shape[1:])
            )
            for name, rows in batch.items()
        }
