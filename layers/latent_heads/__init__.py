"""Heads that draw a vector given an activation: what a next-vector model has for logits.

A head is called as ``head(hidden [B, L, D], noise [B, L N, *head.noise_shape])`` and returns
``[B, L N, Z]`` float32, N draws for each of the L activations, those of one next to each other. All
that is random is in the noise (:meth:`noise`), so draws are a function of keys that the caller
chooses.
"""

from .diffusion import DiffusionHead
from .energy import EnergyHead
from .flow import FlowHead

HEADS = {"energy": EnergyHead, "diffusion": DiffusionHead, "flow": FlowHead}

__all__ = ["HEADS", "DiffusionHead", "EnergyHead", "FlowHead"]
