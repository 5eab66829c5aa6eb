"""Floor 4: metrics and evaluations of models."""

from .brier import BrierLM
from .brier_lm import brier_lm
from .samplers import DenoisingSampler, GeneratingSampler, Sampler

__all__ = ["BrierLM", "DenoisingSampler", "GeneratingSampler", "Sampler", "brier_lm"]
