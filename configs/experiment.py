"""An experiment: everything that decides what a run computes, as one frozen value.

Settings only; ``train/`` holds the code that obeys them. A dataclass with a ``kind`` is one of
several that a field may hold (:mod:`.objectives`, :mod:`.optimizers`); the kind is its tag in JSON
and in ``--set optimizer=muon``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from ..data.config import DataConfig
from ..errors import InputError
from ..model import fields
from ..model.load import saved_config
from ..model.registry import FAMILIES, config_from_dict, config_to_dict
from ..model.retrofit import AnyRetrofit, DecodingHeadsConfig
from ..sharding import AxisRules, MeshConfig
from .checks import require
from .objectives import AutoDeco, NextToken, Objective, check_decoding
from .optimizers import WSD, Muon, Optimizer, Schedule

# ------------------------------------------------------------------------------------------- run


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what happens on the way.

    Attributes:
        steps: optimizer steps.
        accumulation: microbatches a step; each has ``data.batch_size / accumulation`` rows.
        seed: of the initial parameters and of every random number of the objective.
        clip_norm: the global norm that gradients are scaled down to; None leaves them.
        ema_decay: of an exponential moving average of the parameters; None keeps none.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations on held-out data; None never evaluates.
        eval_batches: batches of one evaluation.
        balance_rate: step of the router's balancing bias (arXiv 2408.15664); 0 leaves it.
        balance_steps: the bias is left alone from this step on; None moves it to the end.
        profile_steps: first step (from 0) and number of steps of a profiler trace; None takes none.
        skip_steps: steps (from 1, as metrics and messages count them) whose batches are read and
            passed over, without an update.
    """

    steps: int
    accumulation: int = 1
    seed: int = 0
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    log_every: int = 10
    eval_every: int | None = 100
    eval_batches: int = 8
    balance_rate: float = 1e-3
    balance_steps: int | None = None
    profile_steps: tuple[int, int] | None = None
    skip_steps: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("steps", "accumulation", "log_every", "eval_batches"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}", value, "must be 1 or more")
        require(0 <= self.seed < 2**32, "train.seed", self.seed, "use 0 to 2**32 - 1")
        require(
            self.clip_norm is None or (self.clip_norm > 0 and math.isfinite(self.clip_norm)),
            "train.clip_norm",
            self.clip_norm,
            "must be positive; none turns clipping off",
        )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "train.ema_decay",
            self.ema_decay,
            "must be in (0, 1); none keeps no average",
        )
        require(
            self.eval_every is None or self.eval_every >= 1,
            "train.eval_every",
            self.eval_every,
            "must be 1 or more; none never evaluates",
        )
        require(
            self.balance_rate >= 0 and math.isfinite(self.balance_rate),
            "train.balance_rate",
            self.balance_rate,
            "must not be negative; 0 is off",
        )
        require(
            self.balance_steps is None or self.balance_steps >= 0,
            "train.balance_steps",
            self.balance_steps,
            "must not be negative; none balances to the end",
        )
        if self.profile_steps is not None:
            first, count = self.profile_steps
            require(
                first >= 0 and count >= 1,
                "train.profile_steps",
                self.profile_steps,
                "give the first step (from 0) and how many (1 or more), such as 10,3",
            )
        require(
            all(step >= 1 for step in self.skip_steps),
            "train.skip_steps",
            self.skip_steps,
            "steps are counted from 1",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
        every: steps between checkpoints; the last step of a run is always saved.
        keep_last: the most recent ones to keep.
        keep_best: those with the lowest held-out loss to keep beside them; 0 keeps none for that.
    """

    every: int = 100
    keep_last: int = 3
    keep_best: int = 1

    def __post_init__(self):
        require(self.every >= 1, "checkpoint.every", self.every, "must be 1 or more")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be 1 or more")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must not be negative")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model that a run begins with as another run left it.

    ``--set model.autoencoder=SOURCE`` makes one, and takes the part's configuration from there.

    Attributes:
        name: of the part, an attribute of the model: ``"autoencoder"``.
        source: the workdir (or a checkpoint in one) or the published model that it comes from.
    """

    REMEDY: ClassVar[str] = "take a part from another run with --set model.NAME=SOURCE"

    name: str
    source: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run. Build it from a smaller one with ``dataclasses.replace``.

    Attributes:
        name: what the run calls itself in its workdir and logs.
        model: the config of a family in ``model.registry``.
        mesh, rules: how many devices lie on each mesh axis, and which logical axes lie there.
        retrofits: parts added to the model, such as ``decoding_heads``; which parameters train is
            still ``optimizer.trainable``.
        init_from: the workdir (or a checkpoint in one) of a run whose parameters this one begins
            with; None begins with random ones. Retrofits that the other model lacks are fresh.
        parts: parts of the model that come from elsewhere, an autoencoder; see :class:`Part`.
    """

    name: str
    model: Any
    data: DataConfig
    train: TrainConfig
    objective: Objective = dataclasses.field(default_factory=NextToken)
    optimizer: Optimizer = dataclasses.field(default_factory=Muon)
    schedule: Schedule = dataclasses.field(default_factory=WSD)
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: AxisRules = dataclasses.field(default_factory=AxisRules)
    retrofits: tuple[AnyRetrofit, ...] = ()
    init_from: str | None = None
    parts: tuple[Part, ...] = ()

    def __post_init__(self):
        require(bool(self.name), "name", self.name, "give the experiment a name")
        rows, parts = self.data.batch_size, self.train.accumulation
        require(
            rows % parts == 0,
            "train.accumulation",
            parts,
            f"must divide data.batch_size={rows}, the rows of one optimizer step",
        )
        check_decoding(self.objective, self.model)
        chunk, length = getattr(self.model, "chunk_size", 1), self.data.sequence_length
        require(
            length % chunk == 0,
            "data.sequence_length",
            length,
            f"must be a multiple of the chunk of {chunk} tokens that the model reads at once",
        )
        names = [part.name for part in self.parts]
        # A draft has no model yet.
        known = names if self.model is None else getattr(self.model, "PARTS", ())
        require(
            len(set(names)) == len(names) and set(names) <= set(known),
            "parts",
            names,
            f"name each part once; this model has {', '.join(known) or 'none'}",
        )
        kinds = [retrofit.kind for retrofit in self.retrofits]
        require(len(set(kinds)) == len(kinds), "retrofits", kinds, "attach each kind once")
        if isinstance(self.objective, AutoDeco):
            require(
                DecodingHeadsConfig.kind in kinds,
                "retrofits",
                kinds,
                "objective=autodeco trains decoding heads; set retrofits=decoding_heads",
            )
        phases = [
            (f"schedule.{name}", getattr(self.schedule, name))
            for name in ("warmup_steps", "decay_steps")
            if hasattr(self.schedule, name)
        ]
        if sum(length for _, length in phases) > self.train.steps:
            listed = " + ".join(f"{name}={length}" for name, length in phases)
            raise InputError(
                f"{listed} is longer than train.steps={self.train.steps}; shorten them, or train "
                "for more steps"
            )


def with_part(experiment: Experiment, name: str, source: str) -> Experiment:
    """The experiment whose model has the part ``name`` of ``source``, with its configuration.

    Raises:
        InputError: the model has no such part, or ``source`` holds another kind of model.
    """
    model = experiment.model
    if name not in getattr(model, "PARTS", ()):
        raise InputError(f"model.{name}={source!r}: {type(model).__name__} has no such part")
    config, wanted = saved_config(source, f"model.{name}"), type(getattr(model, name))
    if type(config) is not wanted:
        raise InputError(
            f"model.{name}={source!r} holds a model of {type(config).__name__}; it has to be one "
            f"of {wanted.__name__}"
        )
    others = tuple(part for part in experiment.parts if part.name != name)
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(model, **{name: config}),
        parts=(*others, Part(name, source)),
    )


# ------------------------------------------------------------------------------------------ JSON


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON values; the model carries its family, a union its kind."""
    values = fields.to_json(dataclasses.replace(experiment, model=None))
    return values | {"model": config_to_dict(experiment.model)}


def experiment_from_dict(values: dict[str, Any]) -> Experiment:
    """The experiment of :func:`experiment_to_dict`; absent fields take their defaults.

    Raises:
        InputError: an unknown field, or a value of the wrong type; names the field.
    """
    if not isinstance(values, dict) or "model" not in values:
        raise InputError("an experiment is a JSON object with a `model`; this one has none")
    if not isinstance(values["model"], dict):
        raise InputError(
            f"model={values['model']!r} cannot be used; give an object with the `family`, one of "
            f"{', '.join(FAMILIES)}, and its fields"
        )
    experiment = fields.from_json(values | {"model": None}, Experiment, "")
    return dataclasses.replace(experiment, model=config_from_dict(values["model"]))


def diff(a: Experiment, b: Experiment) -> list[str]:
    """The fields in which two experiments differ, as ``path: value in a -> value in b``."""
    left, right = _leaves(experiment_to_dict(a)), _leaves(experiment_to_dict(b))
    return [
        f"{path}: {left.get(path, 'absent')} -> {right.get(path, 'absent')}"
        for path in dict.fromkeys([*left, *right])
        if left.get(path, _ABSENT) != right.get(path, _ABSENT)
    ]


_ABSENT = object()


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        children = enumerate(value)
    else:
        return {path: value}
    leaves = {}
    for key, child in children:
        leaves |= _leaves(child, f"{path}.{key}" if path else str(key))
    return leaves
