"""Experiments that train adapters on a finished run."""

from __future__ import annotations

import dataclasses

from ..model.lora import LoRAConfig
from .experiment import CheckpointConfig, Experiment, TrainConfig
from .kimi_linear import demo
from .optimizers import AdamW, Constant


def lora_demo() -> Experiment:
    """Adapters on every projection of the demo's model, from runs/demo; a minute on two CPU cores.

    Name a corpus of your own with ``--set data.sources=...``: without, they learn more of what the
    base has learnt from.
    """
    base = demo()
    return dataclasses.replace(
        base,
        name="lora_demo",
        init_from="runs/demo",
        retrofits=(LoRAConfig(),),
        optimizer=AdamW(b2=0.999, weight_decay=0.0, trainable=LoRAConfig.trainable),
        schedule=Constant(learning_rate=2e-3, warmup_steps=10),
        train=TrainConfig(steps=100, log_every=10, eval_every=50, eval_batches=4),
        checkpoint=CheckpointConfig(every=50, keep_last=1),
    )
