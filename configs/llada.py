"""Experiments with LLaDA: a test's, the demo's, the recipe of pre-training and of going on from it.

Learning rates, batches, contexts and token counts of the 8B models are those of arXiv 2502.09992.
"""

from __future__ import annotations

import dataclasses

from ..data.config import DataConfig, SourceConfig
from ..model.llada import LLaDAConfig
from ..sharding import MeshConfig
from .experiment import CheckpointConfig, Experiment, TrainConfig
from .objectives import BlockDiffusion, MaskedDiffusion
from .optimizers import WSD, AdamW, Muon


def llada_tiny() -> Experiment:
    """Some tens of thousands of parameters; seconds on a CPU."""
    return Experiment(
        name="llada_tiny",
        model=LLaDAConfig.tiny(),
        data=DataConfig(sequence_length=32, batch_size=4),
        train=TrainConfig(steps=8, log_every=2, eval_every=4, eval_batches=2),
        objective=MaskedDiffusion(),
        optimizer=AdamW(),
        schedule=WSD(learning_rate=3e-3, warmup_steps=2, decay_steps=2),
        checkpoint=CheckpointConfig(every=4),
    )


def llada_demo() -> Experiment:
    """Bytes of Python source, filled in anywhere; minutes on two CPU cores."""
    return dataclasses.replace(
        llada_tiny(),
        name="llada_demo",
        model=LLaDAConfig.demo(),
        data=DataConfig(sequence_length=256, batch_size=16),
        train=TrainConfig(steps=600, log_every=10, eval_every=100, eval_batches=8),
        optimizer=Muon(),
        schedule=WSD(learning_rate=6e-3, warmup_steps=20, decay_steps=200),
        checkpoint=CheckpointConfig(every=100),
    )


def llada_block_demo() -> Experiment:
    """The demo in blocks of 16 bytes, each filled in behind the ones before it."""
    base = llada_demo()
    return dataclasses.replace(
        base,
        name="llada_block_demo",
        model=dataclasses.replace(base.model, block_size=16),
        objective=BlockDiffusion(),
    )


def llada_8b() -> Experiment:
    """Pre-training of the 8B model: 2.3T tokens in rows of 4096, batches of 1280 rows.

    Reads ``corpus/`` with ``tokenizer.json``, both in the working directory; the published corpus
    is not public. The published schedule warms up in 2000 steps to 4e-4, holds it for 1.2T tokens,
    goes on with 1e-4 for 0.8T, and falls to 1e-5 over the last 0.3T. Ours has one plateau, the
    first.
    """
    length, rows = 4096, 1280
    steps = round(2.3e12 / (length * rows))
    return dataclasses.replace(
        llada_tiny(),
        name="llada_8b",
        model=LLaDAConfig.llada_8b(),
        data=DataConfig(
            sequence_length=length,
            batch_size=rows,
            sources=(SourceConfig(path="corpus"),),
            tokenizer="tokenizer.json",
        ),
        train=TrainConfig(steps=steps, accumulation=4, eval_every=1000, eval_batches=16),
        optimizer=AdamW(weight_decay=0.1),
        schedule=WSD(
            learning_rate=4e-4,
            warmup_steps=2000,
            decay_steps=round(0.3e12 / (length * rows)),
            final=1e-5,
        ),
        checkpoint=CheckpointConfig(every=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def llada_8b_sft() -> Experiment:
    """Fine-tunes GSAI-ML/LLaDA-8B-Base on conversations, ``messages`` of ``chats/*.jsonl``.

    The published recipe (batches of 256, 2.5e-5 after 50 steps of warm-up, down to a tenth over the
    last 10%) and loss: only the last answer is masked and learnt, padding up to the batch's longest
    row is end-of-sequence tokens that are learnt too, and every conversation counts the same. The
    tokenizer must be the model's, with its chat template; ``data.sources.0.chat=false`` with
    ``prompt`` and ``field`` reads pairs without one. The number of steps is ours.
    """
    base, steps = llada_8b(), 2000
    return dataclasses.replace(
        base,
        name="llada_8b_sft",
        init_from="GSAI-ML/LLaDA-8B-Base",
        data=dataclasses.replace(
            base.data,
            batch_size=256,
            packing="single",
            sources=(SourceConfig(path="chats/*.jsonl", field="messages", chat=True),),
        ),
        train=dataclasses.replace(base.train, steps=steps, eval_every=200),
        objective=MaskedDiffusion(normalization="sequence", eos_padding=True, random_length=0.0),
        schedule=WSD(learning_rate=2.5e-5, warmup_steps=50, decay_steps=steps // 10, final=2.5e-6),
        checkpoint=CheckpointConfig(every=500),
    )
