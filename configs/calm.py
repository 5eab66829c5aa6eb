"""Experiments with CALM: a test's, the demo's, the published recipes, and next-token baselines.

Recipes are those of arXiv 2510.27688 and its released scripts. Where those decay no bias and no
norm, ours decays all that is trained.
"""

from __future__ import annotations

import dataclasses

from ..data.config import DataConfig, SourceConfig
from ..model.calm import CALMConfig
from ..model.calm_autoencoder import CALMAutoencoderConfig
from ..model.llada import LLaDAConfig
from ..sharding import MeshConfig
from .experiment import CheckpointConfig, Experiment, TrainConfig
from .objectives import NextToken, NextVector, Reconstruction
from .optimizers import WSD, AdamW, Constant, Muon

# All but the autoencoder.
_TRAINED = r"(?!autoencoder\.).*"


def calm_autoencoder_tiny() -> Experiment:
    """Some thousands of parameters; seconds on a CPU."""
    return Experiment(
        name="calm_autoencoder_tiny",
        model=CALMAutoencoderConfig.tiny(),
        data=DataConfig(sequence_length=32, batch_size=4, align=4),
        train=TrainConfig(steps=8, log_every=2, eval_every=4, eval_batches=2),
        objective=Reconstruction(),
        optimizer=AdamW(),
        schedule=WSD(learning_rate=3e-3, warmup_steps=2, decay_steps=2),
        checkpoint=CheckpointConfig(every=4),
    )


def calm_autoencoder_demo() -> Experiment:
    """Four bytes to 128 numbers and back, above 99.9%; minutes on two CPU cores."""
    return dataclasses.replace(
        calm_autoencoder_tiny(),
        name="calm_autoencoder_demo",
        model=CALMAutoencoderConfig.demo(),
        data=DataConfig(sequence_length=256, batch_size=32, align=4),
        train=TrainConfig(steps=1500, log_every=50, eval_every=250, eval_batches=8),
        schedule=WSD(learning_rate=3e-3, warmup_steps=100, decay_steps=500),
        checkpoint=CheckpointConfig(every=250),
    )


def calm_tiny() -> Experiment:
    """Some tens of thousands of parameters, over a random autoencoder; seconds on a CPU."""
    return dataclasses.replace(
        calm_autoencoder_tiny(),
        name="calm_tiny",
        model=CALMConfig.tiny(),
        objective=NextVector(num_samples=4, num_targets=16, min_reconstruction=0.0),
        optimizer=AdamW(trainable=_TRAINED),
    )


def calm_demo() -> Experiment:
    """Python source, four bytes a step; minutes on two CPU cores.

    Set ``model.autoencoder`` to the workdir of ``calm_autoencoder_demo``.
    """
    return dataclasses.replace(
        calm_tiny(),
        name="calm_demo",
        model=CALMConfig.demo(),
        data=DataConfig(sequence_length=512, batch_size=16, align=4),
        train=TrainConfig(steps=600, log_every=10, eval_every=100, eval_batches=8),
        objective=NextVector(num_targets=32),
        optimizer=Muon(trainable=_TRAINED),
        schedule=WSD(learning_rate=6e-3, warmup_steps=20, decay_steps=200),
        checkpoint=CheckpointConfig(every=100),
    )


def calm_ar_demo() -> Experiment:
    """What ``calm_demo`` is compared with: the same transformer and text, byte by byte."""
    base, model = calm_demo(), CALMConfig.demo()
    return dataclasses.replace(
        base, name="calm_ar_demo", model=_baseline(model), objective=NextToken(), optimizer=Muon()
    )


def calm_autoencoder() -> Experiment:
    """The released autoencoder: 15B tokens in 30,000 steps of 524,288.

    Reads ``corpus/`` with ``tokenizer.json``, both in the working directory: the published text is
    of The Pile, the tokenizer Llama 3's with a padding token behind its last id.
    """
    return dataclasses.replace(
        calm_autoencoder_tiny(),
        name="calm_autoencoder",
        model=CALMAutoencoderConfig.released(),
        data=DataConfig(
            sequence_length=2048,
            batch_size=256,
            sources=(SourceConfig(path="corpus"),),
            tokenizer="tokenizer.json",
            align=4,
        ),
        train=TrainConfig(steps=30_000, eval_every=1000, eval_batches=16),
        schedule=Constant(learning_rate=3e-4, warmup_steps=1000),
        checkpoint=CheckpointConfig(every=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def calm_s() -> Experiment:
    """The model of the paper's ablations: 201M parameters, 50,000 steps."""
    return _published("calm_s", CALMConfig.small(), steps=50_000)


def calm_m() -> Experiment:
    """CALM-M: 371M parameters, 250,000 steps of 2.1M tokens.

    Set ``model.autoencoder`` to the workdir of ``calm_autoencoder``, or to a published one. Reads
    what that does. Documents begin with chunks of their own here (``data.align``); in the published
    data they are joined, and a chunk may hold the end of one and the beginning of another.
    """
    return _published("calm_m", CALMConfig.medium())


def calm_l() -> Experiment:
    """CALM-L: 735M parameters; see ``calm_m``."""
    return _published("calm_l", CALMConfig.large())


def calm_xl() -> Experiment:
    """CALM-XL: 1.82B parameters; see ``calm_m``."""
    return _published("calm_xl", CALMConfig.xlarge())


def calm_ar_s() -> Experiment:
    """The next-token baseline of CALM-S's transformer: 282M parameters."""
    return _baseline_of(calm_s())


def calm_ar_m() -> Experiment:
    """The next-token baseline of CALM-M's transformer: 465M parameters."""
    return _baseline_of(calm_m())


def calm_ar_l() -> Experiment:
    """The next-token baseline of CALM-L's transformer: 847M parameters."""
    return _baseline_of(calm_l())


def _published(name: str, model: CALMConfig, steps: int = 250_000) -> Experiment:
    base = calm_autoencoder()
    return dataclasses.replace(
        base,
        name=name,
        model=model,
        data=dataclasses.replace(base.data, sequence_length=8192, add_bos=True),
        train=dataclasses.replace(base.train, steps=steps, accumulation=8),
        objective=NextVector(),
        optimizer=AdamW(trainable=_TRAINED),
        schedule=Constant(learning_rate=3e-4, warmup_steps=2000),
    )


def _baseline_of(experiment: Experiment) -> Experiment:
    """The same number of tokens a step in rows of 2048, of a model with the same transformer."""
    data = dataclasses.replace(experiment.data, sequence_length=2048, batch_size=1024, align=1)
    return dataclasses.replace(
        experiment,
        name=experiment.name.replace("calm_", "calm_ar_"),
        model=_baseline(experiment.model),
        data=data,
        objective=NextToken(),
        optimizer=AdamW(),
    )


def _baseline(model: CALMConfig) -> LLaDAConfig:
    return LLaDAConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        # There are no masks; no text has this id.
        mask_token_id=model.vocab_size - 1,
        block_size=1,
        logit_shift=True,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.rms_norm_eps,
        initializer_range=model.initializer_range,
        bos_token_id=model.bos_token_id,
        eos_token_id=model.eos_token_id,
        dtype=model.dtype,
        remat=model.remat,
    )
