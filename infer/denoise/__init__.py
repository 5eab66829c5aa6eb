"""Masked denoising: a step of the shared loop that commits tokens in any order."""

from .api import Denoised, History, denoise
from .caches import BlockCache, DualCache, NoCache, PrefixCache
from .elastic import ElasticCache
from .likelihood import Bound, diffusion_log_likelihood
from .parse import parse_cache, parse_rule
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
    stack_rules,
)

__all__ = [
    "BlockCache",
    "Bound",
    "Denoised",
    "DualCache",
    "Dynamic",
    "ElasticCache",
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
    "diffusion_log_likelihood",
    "dream",
    "parse_cache",
    "parse_rule",
    "stack_rules",
]
