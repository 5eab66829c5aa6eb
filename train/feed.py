"""From the host's batches to the devices: whose rows, checked ids, the right sharding."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ..configs.experiment import Experiment
from ..data.pipeline import Pipeline
from ..data.streams import RowBlocks, streams_of_rows
from ..errors import InputError
from .step import batch_sharding

DeviceBatch = dict[str, Int[Array, "B T"]]


def data_rows(experiment: Experiment, mesh: Mesh | None) -> RowBlocks:
    """The rows of a batch that this process feeds, in ascending blocks.

    Their number and places follow from where the mesh has this process's devices. Processes that
    split the model between them feed the same rows.

    Raises:
        InputError: some process's rows do not go with ``data.num_streams``.
    """
    if mesh is None:
        return (range(experiment.data.batch_size),)
    return rows_by_process(experiment, mesh)[jax.process_index()]


def rows_by_process(experiment: Experiment, mesh: Mesh) -> dict[int, RowBlocks]:
    """The rows of a batch that each process of ``mesh`` feeds; its devices need not be there.

    Raises:
        InputError: some process's rows do not go with ``data.num_streams``.
    """
    config = experiment.data
    shape = (config.batch_size, config.sequence_length)
    held = collections.defaultdict(set)
    for device, index in batch_sharding(experiment, mesh).devices_indices_map(shape).items():
        held[device.process_index] |= set(range(config.batch_size)[index[0]])
    blocks = {process: _blocks(rows) for process, rows in held.items()}
    # All processes are asked about all, so that none is left waiting for one that has stopped.
    streams_of_rows(config, list(itertools.chain(*blocks.values())))
    return blocks


def _blocks(rows: Iterable[int]) -> RowBlocks:
    """``rows`` in ascending blocks, each as long as it can be."""
    ordered = np.array(sorted(rows))
    blocks = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return tuple(range(int(block[0]), int(block[-1]) + 1) for block in blocks)


class Feed:
    """Training batches of all processes as device arrays.

    Args:
        experiment: gives the vocabulary and the placement.
        pipeline: of this process's rows.
        mesh: where batches go; None is one device.

    Attributes:
        rows: which of a batch's rows this process feeds.
    """

    def __init__(self, experiment: Experiment, pipeline: Pipeline, mesh: Mesh | None):
        self._pipeline = pipeline
        self._vocab_size = experiment.model.vocab_size
        self._sharding = None if mesh is None else batch_sharding(experiment, mesh)
        self._size = experiment.data.batch_size
        self.rows = data_rows(experiment, mesh)
        self._places = {row: i for i, row in enumerate(itertools.chain(*self.rows))}

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
        return {name: self._spread(rows) for name, rows in batch.items()}

    def _spread(self, rows: np.ndarray) -> jax.Array:
        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(self._size)[index[0]]
            first = self._places[wanted[0]]  # The others follow: they are of one block.
            return rows[first : first + len(wanted), *index[1:]]

        shape = (self._size, *rows.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, of_device)
