"""What a checkpoint of a training run holds, and how the state goes there and comes back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from ..configs.experiment import Experiment, experiment_to_dict
from ..data.pipeline import merge_states
from ..model.checkpoint import CheckpointStore
from .init_from import generation_of
from .step import TrainState
from .workdir import CHECKPOINTS, GENERATION, generation_defaults, tokenizer_files


class TrainCheckpoints:
    """The checkpoints of one run.

    Each holds the parameters, the optimizer's state, the average of the parameters if there is one,
    the state of every process's data streams, the experiment, the tokenizer and how the model
    should be sampled: all that it takes to go on, or to use the model elsewhere.
    """

    def __init__(self, workdir: epath.Path, experiment: Experiment):
        settings = experiment.checkpoint
        self._store = CheckpointStore(
            workdir / CHECKPOINTS, keep_last=settings.keep_last, keep_best=settings.keep_best
        )
        self._experiment = experiment_to_dict(experiment)
        self._generation: dict[str, Any] = {}
        if experiment.init_from is not None:
            self._generation = generation_defaults(workdir, lambda: generation_of(experiment))
        self._files = tokenizer_files(workdir) if jax.process_index() == 0 else {}

    def latest(self) -> int | None:
        """The newest complete step, when the save under way is done; None if there is none."""
        self._store.wait()
        return max(self._store.steps(), default=None)

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: dict[str, Any],
        metric: float | None = None,
    ) -> None:
        """Start saving the state after ``step`` steps; it may be donated when this returns.

        Args:
            step: ``state.step``, as the host knows it.
            state: of the whole run.
            data_state: ``Pipeline.state()`` of this process.
            metric: the held-out loss at this very step, if it was measured; ``keep_best`` goes by
                it.

        Raises:
            SaveError: this save or the one before it failed.
        """
        self._store.save(
            step,
            _trees(state),
            {"experiment": self._experiment, GENERATION: self._generation},
            process_documents={"data": data_state},
            files=self._files,
            metric=metric,
        )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """``(state, data state of all streams)`` of the newest readable checkpoint; None: no one.

        Args:
            abstract: shapes and shardings wanted; the mesh may differ from the one that saved.

        Raises:
            InputError: none is readable, or they are of another model.
        """
        if not self._store.has_any():
            return None
        restored = self._store.restore(_trees(abstract))
        step = jax.device_put(np.int32(restored.step), abstract.step.sharding)
        state = dataclasses.replace(
            abstract,
            step=step,
            params=restored.trees["params"],
            opt_state=restored.trees["optimizer"],
            ema=restored.trees.get("ema"),
        )
        return state, merge_states(restored.process_documents["data"])

    def check(self) -> None:
        """Raise the error of a save that has failed in the background."""
        self._store.check()

    def __enter__(self) -> TrainCheckpoints:
        return self

    def __exit__(self, *_) -> None:
        self._store.close()


def _trees(state: TrainState) -> dict[str, Any]:
    trees = {"params": state.params, "optimizer": state.opt_state}
    return trees if state.ema is None else {**trees, "ema": state.ema}
