"""Floor 3: what a run is: settings, ``--set``, named experiments."""

from .experiment import (
    CheckpointConfig,
    Experiment,
    Part,
    TrainConfig,
    diff,
    experiment_from_dict,
    experiment_to_dict,
    with_part,
)
from .objectives import (
    AutoDeco,
    BlockDiffusion,
    MaskedDiffusion,
    NextToken,
    NextVector,
    Reconstruction,
)
from .optimizers import WSD, AdamW, Constant, Cosine, Linear, Muon
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
    "NextVector",
    "Part",
    "Reconstruction",
    "TrainConfig",
    "diff",
    "experiment_from_dict",
    "experiment_to_dict",
    "get_experiment",
    "overlay",
    "with_part",
]
