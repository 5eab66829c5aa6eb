"""Power sampling: draws from ``p(response | prompt) ** alpha`` over whole responses.

Karan & Du, "Reasoning with sampling" (arXiv 2510.14901). The law of whole responses is not that of
low temperature, which sharpens every token alone: ``p ** alpha`` weighs a token by what can follow.
Three ways to draw from it, behind :func:`power_sample`: Metropolis-Hastings chains, sequential Monte
Carlo, and look-ahead.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PowerSamples:
    """What power sampling drew; with ``n`` samples a prompt, those of a prompt stand together.

    Attributes:
        tokens: of each sample, its stop token included where it drew one.
        text: the tokens decoded, without the stop token.
        logprob: log p of each response under the model itself (alpha 1), ``[C]`` float32, nats.
        finish_reasons: ``"stop"`` or ``"length"``.
        tokens_decoded: tokens drawn in all, of all samples, accepted or not.
        acceptance: ``"mh"``: the accepted share of each block's proposals, ``[blocks]``; proposals
            that change nothing (a cut after the end) are accepted.
        moved: ``"mh"``: the share of each block's proposals that were accepted and changed tokens.
        trace: ``"mh"``: log p of every sample after every step, ``[blocks, steps, C]``.
        effective_sample_size: ``"mh"``: of the samples' mean log p over the last block's steps,
            summed over a prompt's chains, ``[prompts]``; ``"smc"``: ``1 / sum(w ** 2)`` of the last
            weights, ``[prompts, n]``.
        log_evidence: ``"smc"``: the log of the unbiased estimate of ``sum(p ** alpha)``.
    """

    tokens: list[np.ndarray]
    text: list[str]
    logprob: np.ndarray
    finish_reasons: list[str]
    tokens_decoded: int
    acceptance: np.ndarray | None = None
    moved: np.ndarray | None = None
    trace: np.ndarray | None = None
    effective_sample_size: np.ndarray | None = None
    log_evidence: np.ndarray | None = None
