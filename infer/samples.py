"""What power sampling returns, whichever method drew it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from ..model.handle import Model
from .loop import DecodeState
from .programs import responses
from .request import Batch


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
        moved: ``"mh"``: the share of each block's proposals that were accepted and drew tokens.
        trace: ``"mh"``: log p of every sample after every step, ``[blocks, steps, C]``.
        effective_sample_size: ``"mh"``: of the samples' log p over the last block's steps, all
            chains of a prompt together, ``[prompts]``; ``"smc"``: ``1 / sum(w ** 2)`` of the last
            weights, ``[C]``.
        log_evidence: ``"smc"``: the log of the unbiased estimate of ``sum(p ** alpha)``, ``[C]``.
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


def collect(
    model: Model, batch: Batch, state: DecodeState, tokens_decoded: int, **reports
) -> PowerSamples:
    """The requests' rows of a finished ``state``, which has a row for each of ``batch``'s."""
    tokens, lengths, reasons, logprobs = jax.device_get(
        (state.tokens, state.length, state.reason, state.records["logprob"])
    )
    return PowerSamples(
        **responses(model, batch, tokens, lengths, reasons),
        logprob=logprobs[: batch.count].sum(axis=1),
        tokens_decoded=int(tokens_decoded),
        **reports,
    )
