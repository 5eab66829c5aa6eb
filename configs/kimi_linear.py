"""Experiments with Kimi Linear: a test's, the demo, the report's scaling-law sizes, the 48B-A3B.

Learning rates, batches, contexts and token counts of the scaling-law models are the report's
(arXiv 2510.26692, table of section 5.1). It gives no lengths for warm-up and decay; those are ours:
1% and 20% of the steps.
"""

from __future__ import annotations

import dataclasses

from ..data.config import DataConfig, SourceConfig
from ..model.kimi_linear import KimiLinearConfig
from ..sharding import MeshConfig
from .experiment import CheckpointConfig, Experiment, TrainConfig
from .objectives import NextToken
from .optimizers import WSD, Muon


def tiny() -> Experiment:
    """Every kind of layer in a model of some tens of thousands of parameters; seconds on a CPU."""
    return Experiment(
        name="tiny",
        model=KimiLinearConfig.tiny(),
        data=DataConfig(sequence_length=32, batch_size=4),
        train=TrainConfig(steps=8, log_every=2, eval_every=4, eval_batches=2),
        objective=NextToken(),
        optimizer=Muon(),
        schedule=WSD(learning_rate=3e-3, warmup_steps=2, decay_steps=2),
        checkpoint=CheckpointConfig(every=4),
    )


def demo() -> Experiment:
    """Bytes of Python source, learnt in minutes on two CPU cores, well enough to look like it."""
    small = tiny()
    return dataclasses.replace(
        small,
        name="demo",
        model=KimiLinearConfig.demo(),
        data=dataclasses.replace(small.data, sequence_length=256, batch_size=8),
        train=TrainConfig(steps=250, log_every=10, eval_every=50, eval_batches=4),
        schedule=WSD(learning_rate=6e-3, warmup_steps=20, decay_steps=80),
        checkpoint=CheckpointConfig(every=50),
    )


def _scaling(
    name: str, model: KimiLinearConfig, *, tokens: float, learning_rate: float, batch_size: int
) -> Experiment:
    """A row of the scaling-law table, at context 4096.

    Reads ``corpus/`` with ``tokenizer.json``, both in the working directory: the report's corpus
    is not public. Name yours with ``--set data.sources=... --set data.tokenizer=...``.
    """
    base = demo()
    length = 4096
    steps = round(tokens / (batch_size * length))
    return dataclasses.replace(
        base,
        name=name,
        model=model,
        data=DataConfig(
            sequence_length=length,
            batch_size=batch_size,
            sources=(SourceConfig(path="corpus"),),
            tokenizer="tokenizer.json",
        ),
        train=TrainConfig(steps=steps, log_every=10, eval_every=500, eval_batches=16),
        schedule=WSD(
            learning_rate=learning_rate,
            warmup_steps=steps // 100,
            decay_steps=steps // 5,
        ),
        checkpoint=CheckpointConfig(every=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def kimi_linear_653m() -> Experiment:
    """653M active parameters, 38.8B tokens."""
    return _scaling(
        "kimi_linear_653m",
        KimiLinearConfig.scaling_653m(),
        tokens=38.8e9,
        learning_rate=2.006e-3,
        batch_size=336,
    )


def kimi_linear_878m() -> Experiment:
    """878M active parameters, 59.8B tokens."""
    return _scaling(
        "kimi_linear_878m",
        KimiLinearConfig.scaling_878m(),
        tokens=59.8e9,
        learning_rate=1.790e-3,
        batch_size=432,
    )


def kimi_linear_1b1() -> Experiment:
    """1.1B active parameters, 85.2B tokens."""
    return _scaling(
        "kimi_linear_1b1",
        KimiLinearConfig.scaling_1b1(),
        tokens=85.2e9,
        learning_rate=1.617e-3,
        batch_size=512,
    )


def kimi_linear_1b4() -> Experiment:
    """1.4B active parameters, 102.5B tokens."""
    return _scaling(
        "kimi_linear_1b4",
        KimiLinearConfig.scaling_1b4(),
        tokens=102.5e9,
        learning_rate=1.486e-3,
        batch_size=576,
    )


def kimi_linear_1b7() -> Experiment:
    """1.7B active parameters, 128B tokens."""
    return _scaling(
        "kimi_linear_1b7",
        KimiLinearConfig.scaling_1b7(),
        tokens=128.0e9,
        learning_rate=1.371e-3,
        batch_size=640,
    )


def kimi_linear_48b() -> Experiment:
    """The released 48B-A3B as the report's 1.4T-token comparison trained it, without QK-clip.

    Learning rate 1.1e-3, WSD and batches of 32 Mi tokens are published; the balancing bias rests
    during the decay as in Moonlight (arXiv 2502.16982). Warm-up of 500 steps, a decay of 20%, the
    mesh and the accumulation are ours.
    """
    base = _scaling(
        "kimi_linear_48b",
        KimiLinearConfig.kimi_linear_48b(),
        tokens=1.4e12,
        learning_rate=1.1e-3,
        batch_size=8192,
    )
    stable = base.train.steps - base.schedule.decay_steps
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, accumulation=16, balance_steps=stable),
        schedule=dataclasses.replace(base.schedule, warmup_steps=500),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),
    )
