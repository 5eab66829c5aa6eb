"""Masked denoising: a step of the shared loop that commits tokens in any order."""

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
    "Dynamic",
    "EntropyBounded",
    "Factor",
    "Independent",
    "Progress",
    "Rule",
    "Threshold",
    "TopCount",
    "TopQuota",
    "dream",
]
