"""Floor 3: decoding: policies, the loop, its steps, and ``generate``."""

from .beam import BeamResult, beam_search
from .chat import chat
from .choose import Vote, best_of_n, self_consistency
from .constraints import BadWords, GrammarMask, LogitBias, MinNewTokens
from .denoise import (
    Denoised,
    Dynamic,
    ElasticCache,
    EntropyBounded,
    Factor,
    Independent,
    Threshold,
    TopCount,
    TopQuota,
    denoise,
    diffusion_log_likelihood,
    dream,
    parse_rule,
)
from .drafts import Draft, DraftModel, PromptLookup
from .driver import Generation
from .generate import Piece, generate, stream
from .loop import DecodeState, run
from .next_token import NextToken
from .parse import parse_policy
from .penalties import NoRepeatNgram, PresenceFrequencyPenalty, RepetitionPenalty
from .policy import Chain, Greedy, Policy, Temperature
from .power import power_sample
from .samples import PowerSamples
from .speculative import Speculative
from .truncation import MinP, Predicted, SoftTopP, TopK, TopP, Typical
from .vectors import BatchTemperature, ExactTemperature, NextVector

__all__ = [
    "BadWords",
    "BatchTemperature",
    "BeamResult",
    "Chain",
    "DecodeState",
    "Denoised",
    "Draft",
    "DraftModel",
    "Dynamic",
    "ElasticCache",
    "EntropyBounded",
    "ExactTemperature",
    "Factor",
    "Generation",
    "GrammarMask",
    "Greedy",
    "Independent",
    "LogitBias",
    "MinNewTokens",
    "MinP",
    "NextToken",
    "NextVector",
    "NoRepeatNgram",
    "Piece",
    "Policy",
    "PowerSamples",
    "Predicted",
    "PresenceFrequencyPenalty",
    "PromptLookup",
    "RepetitionPenalty",
    "SoftTopP",
    "Speculative",
    "Temperature",
    "Threshold",
    "TopCount",
    "TopK",
    "TopP",
    "TopQuota",
    "Typical",
    "Vote",
    "beam_search",
    "best_of_n",
    "chat",
    "denoise",
    "diffusion_log_likelihood",
    "dream",
    "generate",
    "parse_policy",
    "parse_rule",
    "power_sample",
    "run",
    "self_consistency",
    "stream",
]
