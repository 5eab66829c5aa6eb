"""Floor 3: what a run is: settings, ``--set``, named experiments."""

from .experiment import (
    WSD,
    AdamW,
    AutoDeco,
    BlockDiffusion,
    CheckpointConfig,
    Constant,
    Cosine,
    Experiment,
    Linear,
    MaskedDiffusion,
    Muon,
    NextToken,
    TrainConfig,
    diff,
    experiment_from_dict,
    experiment_to_dict,
)
from .overlay import overlay
from .registry import EXPERIMENTS, get_experiment

__all__ = [
    "EXPERIMENTS",
    "WSD",
    "AdamW",
    "AutoDeco",
    "BlockDiffusion",
    "CheckpointConfig",
    "Constant",
    "Cosine",
    "Experiment",
    "Linear",
    "MaskedDiffusion",
    "Muon",
    "NextToken",
    "TrainConfig",
    "diff",
    "experiment_from_dict",
    "experiment_to_dict",
    "get_experiment",
    "overlay",
]
