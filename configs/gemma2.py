"""Experiments with Gemma-2: a test's, and fine-tuning of the released models."""

from __future__ import annotations

import dataclasses

from ..data.config import DataConfig, SourceConfig
from ..model.gemma2 import Gemma2Config
from ..sharding import MeshConfig
from .experiment import CheckpointConfig, Experiment, TrainConfig
from .optimizers import WSD, AdamW, Cosine


def gemma2_tiny() -> Experiment:
    """Both kinds of layer in a model of some tens of thousands of parameters; seconds on a CPU."""
    return Experiment(
        name="gemma2_tiny",
        model=Gemma2Config.tiny(),
        data=DataConfig(sequence_length=32, batch_size=4),
        train=TrainConfig(steps=8, log_every=2, eval_every=4, eval_batches=2),
        optimizer=AdamW(),
        schedule=WSD(learning_rate=3e-3, warmup_steps=2, decay_steps=2),
        checkpoint=CheckpointConfig(every=4),
    )


def _finetune(name: str, model: Gemma2Config, **mesh: int) -> Experiment:
    """Text of ``corpus/``, in rows of 8192 tokens, by the released model ``google/gemma-2-...``.

    The tokenizer must be the model's: ``tokenizer.json`` of the model's directory, put into the
    working directory, or named with ``--set data.tokenizer=...``. The recipe is C2S-Scale's
    published one for cells (a cosine from 1e-5, 5% warm-up, batches of 32); the number of steps
    is ours.
    """
    return dataclasses.replace(
        gemma2_tiny(),
        name=name,
        model=model,
        init_from=f"google/{name.replace('gemma2_', 'gemma-2-')}",
        data=DataConfig(
            sequence_length=8192,
            batch_size=32,
            sources=(SourceConfig(path="corpus"),),
            tokenizer="tokenizer.json",
            add_bos=True,
        ),
        train=TrainConfig(steps=2000, accumulation=4, eval_every=200, eval_batches=16),
        optimizer=AdamW(weight_decay=0.0),
        schedule=Cosine(learning_rate=1e-5, warmup_steps=100),
        checkpoint=CheckpointConfig(every=500),
        mesh=MeshConfig(data=1, fsdp=-1, **mesh),
    )


def gemma2_2b() -> Experiment:
    """Fine-tunes google/gemma-2-2b."""
    return _finetune("gemma2_2b", Gemma2Config.gemma2_2b())


def gemma2_9b() -> Experiment:
    """Fine-tunes google/gemma-2-9b."""
    return _finetune("gemma2_9b", Gemma2Config.gemma2_9b())


def gemma2_27b() -> Experiment:
    """Fine-tunes google/gemma-2-27b, over 4 devices by heads and hidden units."""
    return _finetune("gemma2_27b", Gemma2Config.gemma2_27b(), tensor=4)
