"""The train step: a pure function from a state and a batch to the next state and its metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ..configs.experiment import Experiment
from ..sharding import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training carries from step to step.

    Attributes:
        step: int32 scalar, the number of optimizer steps taken.
        params: nested dict of float32 arrays.
        opt_state: the optimizer's; nested tuples and dicts keyed by parameter paths.
        ema: an average of ``params`` in the same shape, or None.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None


Build = Callable[[jax.Array], nnx.Module]


def init_state(
    experiment: Experiment, mesh: Mesh | None = None, *, build: Build | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """``(graphdef, state)`` at step 0, every array created on its own shard."""
    raise NotImplementedError


def abstract_state(
    experiment: Experiment, mesh: Mesh | None = None, *, build: Build | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """``(graphdef, state)`` of :func:`init_state` with ``ShapeDtypeStruct`` leaves and shardings."""
    raise NotImplementedError


def make_train_step(experiment: Experiment, graphdef: nnx.GraphDef) -> Callable:
    """The jitted ``(state, batch) -> (state, metrics)``; donates ``state``."""
    raise NotImplementedError


def make_eval_step(experiment: Experiment, graphdef: nnx.GraphDef) -> Callable:
    """The jitted ``(params, batch) -> sums``: add them over batches, then :func:`summarise`."""
    raise NotImplementedError


def summarise(sums: dict[str, Any]) -> dict[str, jax.Array]:
    """Per-token means of the sums of one or more evaluation batches."""
    raise NotImplementedError
