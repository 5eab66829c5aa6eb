"""Masked denoising: a step of the shared loop that commits tokens in any order."""

from .api import Denoised, History, denoise
from .caches import BlockCache, DualCache, NoCache, PrefixCache
from .rules import (
    Dynamic,
    EntropyBounded,
    Factor,
    Independent,
    Progress,
    Rule,
    Threshold,
    TopCount,
    TopQuota,
    dream,
)

__all__ = [
    "BlockCache",
    "Denoised",
    "DualCache",
    "Dynamic",
    "EntropyBounded",
    "Factor",
    "History",
    "Independent",
    "NoCache",
    "PrefixCache",
    "Progress",
    "Rule",
    "Threshold",
    "TopCount",
    "TopQuota",
    "denoise",
    "dream",
]
