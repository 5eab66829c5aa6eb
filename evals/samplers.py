"""Whatever continues a text by four tokens: the one thing that BrierLM asks of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import InputError
from ..infer import Policy, Temperature, TopQuota, denoise, generate
from ..infer.denoise.rules import Rule
from ..infer.denoise.settings import mask_of
from ..model.handle import Model
from .brier import NGRAM

# The model's own law: every token by its probability, places in any order.
_OWN_ORDER = TopQuota("random")
_OWN_POLICY = Temperature(1.0)


class Sampler(Protocol):
    """Draws what follows a text. What is scored is the law of these draws."""

    def sample(self, prefixes: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
        """Four tokens after each prefix.

        Args:
            prefixes: token ids ``[n]`` int32 each, at least one; of any lengths.
            seeds: below 2**32, one each. A row is a function of its own prefix and seed.

        Returns:
            ``[N, 4]`` integers.
        """


@dataclasses.dataclass(frozen=True)
class DenoisingSampler:
    """A masked diffusion model that sees the text before and four masks.

    The defaults commit one token a call, at a place drawn at random, from the model's own
    distribution; other settings of :func:`jaxalope.denoise` are other laws, with other scores.

    Attributes:
        model: a masked diffusion model.
        rule: which masks a call fills in.
        policy: that tokens are drawn by.
        steps: calls for the four; None is four.
        cfg_scale: of guidance.
    """

    model: Model
    rule: Rule = _OWN_ORDER
    policy: Policy = _OWN_POLICY
    steps: int | None = None
    cfg_scale: float = 0.0

    def __post_init__(self):
        mask_of(self.model)

    def sample(self, prefixes: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
        """See :class:`Sampler`."""
        mask = mask_of(self.model)
        if any(np.any(prefix == mask) for prefix in prefixes):
            raise InputError(
                f"documents hold the mask, token {mask} (model.mask_token_id); score a text without"
            )
        filled = denoise(
            self.model,
            list(prefixes),
            gen_length=NGRAM,
            steps=self.steps,
            rule=self.rule,
            policy=self.policy,
            cfg_scale=self.cfg_scale,
            seed=list(seeds),
            stop_tokens=[],
        )
        return np.stack(filled.tokens)


@dataclasses.dataclass(frozen=True)
class GeneratingSampler:
    """A next-token model through :func:`jaxalope.generate`: by any policy, with its own score.

    Attributes:
        model: a next-token model.
        policy: that tokens are drawn by.
    """

    model: Model
    policy: Policy = _OWN_POLICY

    def sample(self, prefixes: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
        """See :class:`Sampler`."""
        drawn = generate(
            self.model, list(prefixes), self.policy, NGRAM, list(seeds), stop_tokens=[], stop=()
        )
        return np.stack(drawn.tokens)
