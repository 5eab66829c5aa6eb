"""Experiments with GPT-NeoX: a test's, and fine-tuning of the released Pythia models."""

from __future__ import annotations

import dataclasses

from ..data.config import DataConfig, SourceConfig
from ..model.gpt_neox import GPTNeoXConfig
from ..sharding import MeshConfig
from .experiment import CheckpointConfig, Experiment, TrainConfig
from .optimizers import WSD, AdamW, Cosine


def gpt_neox_tiny() -> Experiment:
    """Some tens of thousands of parameters; seconds on a CPU."""
    return Experiment(
        name="gpt_neox_tiny",
        model=GPTNeoXConfig.tiny(),
        data=DataConfig(sequence_length=32, batch_size=4),
        train=TrainConfig(steps=8, log_every=2, eval_every=4, eval_batches=2),
        optimizer=AdamW(),
        schedule=WSD(learning_rate=3e-3, warmup_steps=2, decay_steps=2),
        checkpoint=CheckpointConfig(every=4),
    )


def _finetune(size: str, model: GPTNeoXConfig) -> Experiment:
    """Text of ``corpus/``, in rows of 8192 tokens, by the released model ``EleutherAI/pythia-...``.

    The tokenizer must be the model's: ``tokenizer.json`` of the model's directory, put into the
    working directory, or named with ``--set data.tokenizer=...``. The recipe is C2S-Scale's
    published one for cells (a cosine from 1e-5, 5% warm-up, batches of 32); the number of steps
    is ours.
    """
    return dataclasses.replace(
        gpt_neox_tiny(),
        name=f"pythia_{size.replace('.', '_')}",
        model=model,
        init_from=f"EleutherAI/pythia-{size}",
        data=DataConfig(
            sequence_length=8192,
            batch_size=32,
            sources=(SourceConfig(path="corpus"),),
            tokenizer="tokenizer.json",
        ),
        train=TrainConfig(steps=2000, accumulation=4, eval_every=200, eval_batches=16),
        optimizer=AdamW(weight_decay=0.0),
        schedule=Cosine(learning_rate=1e-5, warmup_steps=100),
        checkpoint=CheckpointConfig(every=500),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def pythia_70m() -> Experiment:
    """Fine-tunes EleutherAI/pythia-70m."""
    return _finetune("70m", GPTNeoXConfig.pythia_70m())


def pythia_160m() -> Experiment:
    """Fine-tunes EleutherAI/pythia-160m."""
    return _finetune("160m", GPTNeoXConfig.pythia_160m())


def pythia_410m() -> Experiment:
    """Fine-tunes EleutherAI/pythia-410m."""
    return _finetune("410m", GPTNeoXConfig.pythia_410m())


def pythia_1b() -> Experiment:
    """Fine-tunes EleutherAI/pythia-1b."""
    return _finetune("1b", GPTNeoXConfig.pythia_1b())


def pythia_1_4b() -> Experiment:
    """Fine-tunes EleutherAI/pythia-1.4b."""
    return _finetune("1.4b", GPTNeoXConfig.pythia_1_4b())


def pythia_2_8b() -> Experiment:
    """Fine-tunes EleutherAI/pythia-2.8b."""
    return _finetune("2.8b", GPTNeoXConfig.pythia_2_8b())


def pythia_6_9b() -> Experiment:
    """Fine-tunes EleutherAI/pythia-6.9b."""
    return _finetune("6.9b", GPTNeoXConfig.pythia_6_9b())


def pythia_12b() -> Experiment:
    """Fine-tunes EleutherAI/pythia-12b."""
    return _finetune("12b", GPTNeoXConfig.pythia_12b())
