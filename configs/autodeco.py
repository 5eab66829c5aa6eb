"""Experiments that train AutoDeco's decoding heads on a finished run."""

from __future__ import annotations

import dataclasses

from ..model.retrofit import DecodingHeadsConfig
from .experiment import CheckpointConfig, Experiment, TrainConfig
from .kimi_linear import demo
from .objectives import AutoDeco
from .optimizers import AdamW, Constant


def autodeco_demo() -> Experiment:
    """Decoding heads for the demo's model, from runs/demo; a minute on two CPU cores.

    The objective is the published recipe. Its learning rate (5e-6, for 400 steps of long answers
    that a large model gave itself) would not move these heads in so few tokens of plain text: ours
    is 1e-3.
    """
    base = demo()
    return dataclasses.replace(
        base,
        name="autodeco_demo",
        init_from="runs/demo",
        retrofits=(DecodingHeadsConfig(),),
        objective=AutoDeco(),
        optimizer=AdamW(b2=0.999, weight_decay=0.0, trainable=r"decoding_heads\..*"),
        schedule=Constant(learning_rate=1e-3, warmup_steps=10),
        train=TrainConfig(steps=100, log_every=10, eval_every=50, eval_batches=4),
        checkpoint=CheckpointConfig(every=50, keep_last=1),
    )
