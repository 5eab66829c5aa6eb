"""An experiment: everything that decides what a run computes, as one frozen value.

Settings only; ``train/`` holds the code that obeys them. A dataclass with a ``kind`` is one of
several that a field may hold (an optimizer, a schedule, an objective); the kind is its tag in JSON
and in ``--set optimizer=muon``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, ClassVar, Literal

from ..data.config import DataConfig
from ..errors import InputError
from ..model.registry import config_from_dict, config_to_dict, decoding_of
from ..model.retrofit import AnyRetrofit, DecodingHeadsConfig
from ..sharding import AxisRules, MeshConfig
from . import fields


def _require(ok: bool, field: str, value: object, remedy: str) -> None:
    if not ok:
        raise InputError(f"{field}={value!r}: {remedy}")


def _finite(value: float) -> bool:
    return math.isfinite(value)


# ------------------------------------------------------------------------------------ objectives


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token.

    Attributes:
        z_loss: weight of ``logsumexp(logits)²`` added to every token's loss; 0 is off.
        max_logits: most float32 logits of a device alive at once; a larger batch x vocabulary is
            taken in chunks along the sequence. The default is 512 MiB of them.
    """

    kind: ClassVar[str] = "next_token"

    z_loss: float = 0.0
    max_logits: int = 2**27

    def __post_init__(self):
        _require(
            self.z_loss >= 0 and _finite(self.z_loss),
            "objective.z_loss",
            self.z_loss,
            "use 0 (off) or a small positive number, such as 1e-4",
        )
        _require(self.max_logits > 0, "objective.max_logits", self.max_logits, "must be positive")


@dataclasses.dataclass(frozen=True)
class AutoDeco:
    """Decoding heads on a frozen model (arXiv 2510.26697): a temperature and a top-p term.

    The defaults are the published recipe, whose temperatures are useful in their order but biased:
    dropping easy tokens raises them, weighting lowers them. ``train/autodeco.py`` says what the
    other estimators correct, ``docs/autodeco.md`` what was measured.

    Attributes:
        easy_drop: share of the tokens that the model ranks first which the temperature term drops,
            drawn anew in every step.
        dft_weight: weigh every token by its probability under the model.
        estimator: ``"published"``, two terms; ``"likelihood"``, one cross-entropy of what would be
            decoded, without dropping or weight; or ``"conditional"``, one that keeps both and
            corrects for them.
        sharpness: of the soft top-p mask's edge.
        max_logits: most float32 numbers of a device that belong to logits, ranks and probabilities,
            alive at once (512 MiB); a larger batch x vocabulary is taken in chunks along the
            sequence.
    """

    kind: ClassVar[str] = "autodeco"

    easy_drop: float = 0.6
    dft_weight: bool = True
    estimator: Literal["published", "likelihood", "conditional"] = "published"
    sharpness: float = 30.0
    max_logits: int = 2**27

    def __post_init__(self):
        _require(
            0 <= self.easy_drop < 1,
            "objective.easy_drop",
            self.easy_drop,
            "must be in [0, 1); 0 keeps every token, 0.6 is published",
        )
        _require(
            self.estimator in ("published", "likelihood", "conditional"),
            "objective.estimator",
            self.estimator,
            "use published, likelihood or conditional",
        )
        _require(
            self.sharpness > 0 and _finite(self.sharpness),
            "objective.sharpness",
            self.sharpness,
            "must be positive; 30 is published",
        )
        _require(self.max_logits > 0, "objective.max_logits", self.max_logits, "must be positive")


def _check_noise(objective: MaskedDiffusion | BlockDiffusion) -> None:
    _require(
        objective.schedule in ("linear", "poly2", "cosine"),
        "objective.schedule",
        objective.schedule,
        "use linear, poly2 or cosine",
    )
    _require(
        0 <= objective.eps < 1,
        "objective.eps",
        objective.eps,
        "must be in [0, 1); 1e-3 is published",
    )
    low, high = objective.band
    _require(
        0 <= low < high <= 1,
        "objective.band",
        objective.band,
        "give the lowest and the highest noise level, such as 0,1 (all) or 0.3,0.8",
    )
    _require(
        objective.max_logits > 0, "objective.max_logits", objective.max_logits, "must be positive"
    )


@dataclasses.dataclass(frozen=True)
class MaskedDiffusion:
    """Masked tokens from all others (LLaDA, arXiv 2502.09992); the defaults are its pre-training.

    A row gets a noise level ``t``, each of its tokens is masked with probability ``p(t)``, and the
    model names what was there. ``train/noise.py`` has the equations. Tokens whose ``loss_weights``
    are 0, a prompt, are never masked.

    Attributes:
        weighting: of a masked token: ``"bound"``, so that the loss is a bound on the negative
            log-likelihood (``1 / p`` on the linear schedule); ``"uniform"``, 1; ``"cart"``, more
            where visible tokens are near (Dream, arXiv 2508.15487).
        normalization: ``"token"``, a mean over all tokens that could have been masked; or
            ``"sequence"``, such a mean in every document and then over documents (fine-tuning).
        schedule: ``p(t)``: ``"linear"`` t, ``"poly2"`` t², ``"cosine"`` cos(π/2 (1 - t)).
        exact_ratio: mask one token at least, and take the share that was masked for ``p``.
        stratified: one ``t`` of a batch in each of as many equal intervals, instead of anywhere.
        complementary: read every row a second time with all other tokens masked.
        eps: the least mask probability, ``p = (1 - eps) p(t) + eps``; without exact ratio.
        band: the lowest and highest ``t``.
        random_length: probability that a step's rows are cut to a random length, one for all.
        eos_padding: padding behind a document becomes end-of-sequence tokens of it, that are
            learnt as any other (fine-tuning).
        max_logits: see :class:`NextToken`.
    """

    kind: ClassVar[str] = "masked_diffusion"

    weighting: Literal["bound", "uniform", "cart"] = "bound"
    normalization: Literal["token", "sequence"] = "token"
    schedule: Literal["linear", "poly2", "cosine"] = "linear"
    exact_ratio: bool = False
    stratified: bool = True
    complementary: bool = False
    eps: float = 1e-3
    band: tuple[float, float] = (0.0, 1.0)
    random_length: float = 0.01
    eos_padding: bool = False
    max_logits: int = 2**27

    def __post_init__(self):
        _require(
            self.weighting in ("bound", "uniform", "cart"),
            "objective.weighting",
            self.weighting,
            "use bound, uniform or cart",
        )
        _require(
            self.normalization in ("token", "sequence"),
            "objective.normalization",
            self.normalization,
            "use token or sequence",
        )
        _require(
            0 <= self.random_length <= 1,
            "objective.random_length",
            self.random_length,
            "must be a probability; 0.01 is published, 0 cuts nothing",
        )
        _check_noise(self)


@dataclasses.dataclass(frozen=True)
class BlockDiffusion:
    """Each block of a text from the blocks before it, all in one pass (arXiv 2503.09573).

    Blocks have ``model.block_size`` tokens and a noise level each. The model reads the masked text
    and the clean one beside it; see ``train/noise.py``.

    Attributes:
        schedule, stratified, eps, band, eos_padding: as of :class:`MaskedDiffusion`, with a level
            for every block; strata are as many as a batch without padding has blocks.
        max_logits: see :class:`NextToken`.
    """

    kind: ClassVar[str] = "block_diffusion"

    schedule: Literal["linear", "poly2", "cosine"] = "linear"
    stratified: bool = True
    eps: float = 1e-3
    band: tuple[float, float] = (0.0, 1.0)
    eos_padding: bool = False
    max_logits: int = 2**27

    def __post_init__(self):
        _check_noise(self)


Objective = NextToken | AutoDeco | MaskedDiffusion | BlockDiffusion


def _check_decoding(objective: Objective, model: Any) -> None:
    """Refuse an objective that this model is not read by; ``model`` is None in a draft."""
    if model is None:
        return
    masked = decoding_of(model) == "masked_diffusion"
    if isinstance(objective, NextToken | AutoDeco):
        _require(
            not masked,
            "objective",
            objective.kind,
            f"{type(model).__name__} here fills in masks; use masked_diffusion, or "
            "block_diffusion with model.block_size",
        )
        return
    _require(
        masked,
        "objective",
        objective.kind,
        f"{type(model).__name__} here predicts the next token; use next_token, or a model with a "
        "mask token, such as llada",
    )
    blocks = isinstance(objective, BlockDiffusion)
    _require(
        (model.block_size is not None) == blocks,
        "objective",
        objective.kind,
        f"model.block_size={model.block_size}: block_diffusion needs one, masked_diffusion none",
    )
    _require(
        not objective.eos_padding or model.eos_token_id is not None,
        "objective.eos_padding",
        True,
        "model.eos_token_id is None; name the token that ends a text",
    )


# ------------------------------------------------------------------------------------ optimizers


def _check_shared(optimizer: AdamW | Muon) -> None:
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"optimizer.{name}", value, "must be in [0, 1)")
    _require(optimizer.eps > 0, "optimizer.eps", optimizer.eps, "must be positive")
    _require(
        optimizer.weight_decay >= 0 and _finite(optimizer.weight_decay),
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
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be in [0, 1)")
        _require(
            self.newton_schulz_steps >= 1,
            "optimizer.newton_schulz_steps",
            self.newton_schulz_steps,
            "must be 1 or more",
        )
        _require(self.rms > 0, "optimizer.rms", self.rms, "must be positive")


Optimizer = AdamW | Muon


# ------------------------------------------------------------------------------------- schedules


def _check_schedule(schedule: Schedule) -> None:
    for name in ("learning_rate", "final"):
        value = getattr(schedule, name, 0.0)
        _require(value >= 0 and _finite(value), f"schedule.{name}", value, "must not be negative")
    for name in ("warmup_steps", "decay_steps"):
        value = getattr(schedule, name, 0)
        _require(value >= 0, f"schedule.{name}", value, "must not be negative; 0 is none")


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
        _require(
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

    def __post_init__(self):
        for name in ("steps", "accumulation", "log_every", "eval_batches"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}", value, "must be 1 or more")
        _require(0 <= self.seed < 2**32, "train.seed", self.seed, "use 0 to 2**32 - 1")
        _require(
            self.clip_norm is None or (self.clip_norm > 0 and _finite(self.clip_norm)),
            "train.clip_norm",
            self.clip_norm,
            "must be positive; none turns clipping off",
        )
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "train.ema_decay",
            self.ema_decay,
            "must be in (0, 1); none keeps no average",
        )
        _require(
            self.eval_every is None or self.eval_every >= 1,
            "train.eval_every",
            self.eval_every,
            "must be 1 or more; none never evaluates",
        )
        _require(
            self.balance_rate >= 0 and _finite(self.balance_rate),
            "train.balance_rate",
            self.balance_rate,
            "must not be negative; 0 is off",
        )
        _require(
            self.balance_steps is None or self.balance_steps >= 0,
            "train.balance_steps",
            self.balance_steps,
            "must not be negative; none balances to the end",
        )
        if self.profile_steps is not None:
            first, count = self.profile_steps
            _require(
                first >= 0 and count >= 1,
                "train.profile_steps",
                self.profile_steps,
                "give the first step (from 0) and how many (1 or more), such as 10,3",
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
        _require(self.every >= 1, "checkpoint.every", self.every, "must be 1 or more")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be 1 or more")
        _require(
            self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must not be negative"
        )


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
    """

    name: str
    model: Any
    data: DataConfig
    train: TrainConfig
    objective: Objective = NextToken()
    optimizer: Optimizer = Muon()
    schedule: Schedule = WSD()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: AxisRules = dataclasses.field(default_factory=AxisRules)
    retrofits: tuple[AnyRetrofit, ...] = ()
    init_from: str | None = None

    def __post_init__(self):
        _require(bool(self.name), "name", self.name, "give the experiment a name")
        rows, parts = self.data.batch_size, self.train.accumulation
        _require(
            rows % parts == 0,
            "train.accumulation",
            parts,
            f"must divide data.batch_size={rows}, the rows of one optimizer step",
        )
        _check_decoding(self.objective, self.model)
        kinds = [retrofit.kind for retrofit in self.retrofits]
        _require(len(set(kinds)) == len(kinds), "retrofits", kinds, "attach each kind once")
        if isinstance(self.objective, AutoDeco):
            _require(
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
