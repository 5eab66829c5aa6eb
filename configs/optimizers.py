"""How parameters move: optimizers and learning-rate schedules, one frozen dataclass each."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import ClassVar

from ..errors import InputError
from .checks import require

# ------------------------------------------------------------------------------------ optimizers


_POSITIVE = "must be positive and finite"


def _is_positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _check_shared(optimizer: AdamW | Muon) -> None:
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        require(0 <= value < 1, f"optimizer.{name}", value, "must be in [0, 1)")
    require(_is_positive(optimizer.eps), "optimizer.eps", optimizer.eps, _POSITIVE)
    require(
        optimizer.weight_decay >= 0 and math.isfinite(optimizer.weight_decay),
        "optimizer.weight_decay",
        optimizer.weight_decay,
        "must not be negative; 0 is off",
    )
    try:
        re.compile(optimizer.trainable)
    except re.error as e:
        raise InputError(
            f"optimizer.trainable={optimizer.trainable!r} is not a regular expression ({e}); "
            "'.*' trains everything, '.*lora.*' only parameters with lora in their path"
        ) from e


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019), decayed at the learning rate.

    Attributes:
        b1, b2: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: for every parameter except the decay gates ``A_log`` and ``dt_bias``.
        trainable: regular expression that a parameter's whole path must match to be trained.
    """

    kind: ClassVar[str] = "adamw"

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    trainable: str = ".*"

    def __post_init__(self):
        _check_shared(self)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon in Moonlight's form (arXiv 2502.16982) for matrices, AdamW for everything else.

    Attributes:
        momentum: of the matrices' gradient.
        newton_schulz_steps: quintic iterations of the orthogonalisation.
        rms: the root mean square of an update before the learning rate; 0.2 is AdamW's usual one,
            so that both can share a learning rate.
        weight_decay: decoupled, for both parts; not for ``A_log`` and ``dt_bias``.
        b1, b2, eps: of the AdamW part.
        trainable: regular expression that a parameter's whole path must match to be trained.
    """

    kind: ClassVar[str] = "muon"

    momentum: float = 0.95
    newton_schulz_steps: int = 5
    rms: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    trainable: str = ".*"

    def __post_init__(self):
        _check_shared(self)
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be in [0, 1)")
        require(
            self.newton_schulz_steps >= 1,
            "optimizer.newton_schulz_steps",
            self.newton_schulz_steps,
            "must be 1 or more",
        )
        require(_is_positive(self.rms), "optimizer.rms", self.rms, _POSITIVE)


Optimizer = AdamW | Muon


# ------------------------------------------------------------------------------------- schedules


def _check_schedule(schedule: Schedule) -> None:
    for name in ("learning_rate", "final"):
        value = getattr(schedule, name, 0.0)
        require(
            value >= 0 and math.isfinite(value), f"schedule.{name}", value, "must not be negative"
        )
    for name in ("warmup_steps", "decay_steps"):
        value = getattr(schedule, name, 0)
        require(value >= 0, f"schedule.{name}", value, "must not be negative; 0 is none")


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395): linear up, constant, then down at the very end.

    Attributes:
        learning_rate: of the stable phase.
        warmup_steps: steps of the linear rise.
        decay_steps: steps of the fall, the last ones of the run.
        decay: its shape: ``"linear"``, ``"cosine"`` or ``"sqrt"`` (1 - sqrt(t), arXiv 2405.18392).
        final: the learning rate after the last step.
    """

    kind: ClassVar[str] = "wsd"

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    decay_steps: int = 0
    decay: str = "linear"
    final: float = 0.0

    def __post_init__(self):
        _check_schedule(self)
        require(
            self.decay in ("linear", "cosine", "sqrt"),
            "schedule.decay",
            self.decay,
            "use linear, cosine or sqrt",
        )


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up over ``warmup_steps``, then half a cosine down to ``final`` at the end."""

    kind: ClassVar[str] = "cosine"

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self):
        _check_schedule(self)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Linear warm-up over ``warmup_steps``, then a straight line down to ``final`` at the end."""

    kind: ClassVar[str] = "linear"

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self):
        _check_schedule(self)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Linear warm-up over ``warmup_steps``, then ``learning_rate``."""

    kind: ClassVar[str] = "constant"

    learning_rate: float = 1e-3
    warmup_steps: int = 0

    def __post_init__(self):
        _check_schedule(self)


Schedule = WSD | Cosine | Linear | Constant
