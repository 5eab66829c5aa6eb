"""Next-token and masked-diffusion models that read little text many times (arXiv 2511.03276).

Each pair differs in nothing but what the model sees of a token's neighbours and what it is asked:
the next-token arm is the same module with a causal mask and shifted logits. The text is made, and
the runs are made and compared, by ``bench/dlm_crossover.py``; these experiments read its files from
the working directory.
"""

from __future__ import annotations

import dataclasses

from ..data.config import DataConfig, SourceConfig
from ..model.llada import LLaDAConfig
from .experiment import CheckpointConfig, Experiment, TrainConfig
from .objectives import MaskedDiffusion, NextToken
from .optimizers import WSD, AdamW


def dlm_crossover() -> Experiment:
    """Masked diffusion on 16 KiB of Python source, 120 times over; a minute or two on two cores."""
    return Experiment(
        name="dlm_crossover",
        model=LLaDAConfig(
            vocab_size=320,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=4,
            intermediate_size=176,
            mask_token_id=259,
            eos_token_id=258,
            rope_theta=10000.0,
            initializer_range=0.05,
        ),
        # Documents are small, so that their order, and with it where rows begin, is another one
        # each epoch.
        data=DataConfig(
            sequence_length=64,
            batch_size=32,
            sources=(SourceConfig(path="train.txt", max_document_bytes=1024),),
            eval_sources=(SourceConfig(path="held_out.txt"),),
        ),
        train=TrainConfig(steps=960, log_every=40, eval_every=40, eval_batches=32),
        objective=MaskedDiffusion(random_length=0.0),
        optimizer=AdamW(),
        schedule=WSD(learning_rate=2e-3, warmup_steps=50),
        checkpoint=CheckpointConfig(every=960),
    )


def dlm_crossover_ar() -> Experiment:
    """The next-token arm of :func:`dlm_crossover`."""
    return _next_token(dlm_crossover())


def dlm_crossover_gpu() -> Experiment:
    """Masked diffusion on 2M tokens, for minutes on one accelerator: 34M parameters in the blocks.

    Expects ``tokenizer/``, a byte-level BPE of 8192 ids, beside the text.
    """
    base = dlm_crossover()
    return dataclasses.replace(
        base,
        name="dlm_crossover_gpu",
        model=dataclasses.replace(
            base.model,
            # The tokenizer's ids, a mask, and room up to a multiple of 64.
            vocab_size=8256,
            hidden_size=512,
            num_layers=8,
            num_attention_heads=8,
            num_kv_heads=8,
            intermediate_size=2048,
            mask_token_id=8192,
            eos_token_id=2,
            initializer_range=0.02,
            dtype="bfloat16",
        ),
        data=dataclasses.replace(
            base.data,
            sequence_length=512,
            batch_size=64,
            tokenizer="tokenizer",
            sources=(SourceConfig(path="train.txt", max_document_bytes=16384),),
        ),
        train=TrainConfig(steps=6000, log_every=100, eval_every=250, eval_batches=16),
        schedule=WSD(learning_rate=1e-3, warmup_steps=200, decay_steps=600, final=1e-4),
        checkpoint=CheckpointConfig(every=3000),
    )


def dlm_crossover_gpu_ar() -> Experiment:
    """The next-token arm of :func:`dlm_crossover_gpu`."""
    return _next_token(dlm_crossover_gpu())


def _next_token(experiment: Experiment) -> Experiment:
    model = dataclasses.replace(experiment.model, block_size=1, logit_shift=True)
    return dataclasses.replace(
        experiment, name=experiment.name + "_ar", model=model, objective=NextToken()
    )
