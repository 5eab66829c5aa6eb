"""What a run minimises: one frozen dataclass an objective; ``train/`` holds what computes it.

Its ``kind`` is its name in JSON and in ``--set objective=masked_diffusion``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from ..model.registry import decoding_of
from .checks import require


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token.

    Attributes:
        z_loss: weight of ``logsumexp(logits)²`` added to every token's loss; 0 is off.
        max_logits: most float32 logits of a device alive at once; a larger batch x vocabulary is
            taken in chunks of tokens. The default is 512 MiB of them.
    """

    kind: ClassVar[str] = "next_token"

    z_loss: float = 0.0
    max_logits: int = 2**27

    def __post_init__(self):
        require(
            self.z_loss >= 0 and math.isfinite(self.z_loss),
            "objective.z_loss",
            self.z_loss,
            "use 0 (off) or a small positive number, such as 1e-4",
        )
        require(self.max_logits > 0, "objective.max_logits", self.max_logits, "must be positive")


@dataclasses.dataclass(frozen=True)
class AutoDeco:
    """Decoding heads on a frozen model (arXiv 2510.26697): a temperature and a top-p term.

    The defaults are the published recipe, whose temperatures are useful in their order but biased:
    dropping easy tokens raises them, weighting lowers them. ``train/autodeco.py`` says what the
    other estimators correct, ``docs/autodeco.md`` what was measured.

    Attributes:
        easy_drop: share of the tokens that the model ranks first which the temperature term drops,
            drawn anew in every step.
        dft_weight: weigh every token by its probability under the model.
        estimator: ``"published"``, two terms; ``"likelihood"``, one cross-entropy of what would be
            decoded, without dropping or weight; or ``"conditional"``, one that keeps both and
            corrects for them.
        sharpness: of the soft top-p mask's edge.
        max_logits: most float32 numbers of a device that belong to logits, ranks and probabilities,
            alive at once (512 MiB); a larger batch x vocabulary is taken in chunks along the
            sequence.
    """

    kind: ClassVar[str] = "autodeco"

    easy_drop: float = 0.6
    dft_weight: bool = True
    estimator: Literal["published", "likelihood", "conditional"] = "published"
    sharpness: float = 30.0
    max_logits: int = 2**27

    def __post_init__(self):
        require(
            0 <= self.easy_drop < 1,
            "objective.easy_drop",
            self.easy_drop,
            "must be in [0, 1); 0 keeps every token, 0.6 is published",
        )
        require(
            self.estimator in ("published", "likelihood", "conditional"),
            "objective.estimator",
            self.estimator,
            "use published, likelihood or conditional",
        )
        require(
            self.sharpness > 0 and math.isfinite(self.sharpness),
            "objective.sharpness",
            self.sharpness,
            "must be positive; 30 is published",
        )
        require(self.max_logits > 0, "objective.max_logits", self.max_logits, "must be positive")


def _check_noise(objective: MaskedDiffusion | BlockDiffusion) -> None:
    require(
        objective.schedule in ("linear", "poly2", "cosine"),
        "objective.schedule",
        objective.schedule,
        "use linear, poly2 or cosine",
    )
    require(
        0 <= objective.eps < 1,
        "objective.eps",
        objective.eps,
        "must be in [0, 1); 1e-3 is published",
    )
    low, high = objective.band
    require(
        0 <= low < high <= 1,
        "objective.band",
        objective.band,
        "give the lowest and the highest noise level, such as 0,1 (all) or 0.3,0.8",
    )
    require(
        objective.sharpening >= 0 and math.isfinite(objective.sharpening),
        "objective.sharpening",
        objective.sharpening,
        "must not be negative; 0 is off",
    )
    require(
        objective.max_logits > 0, "objective.max_logits", objective.max_logits, "must be positive"
    )


@dataclasses.dataclass(frozen=True)
class MaskedDiffusion:
    """Masked tokens from all others (LLaDA, arXiv 2502.09992); the defaults are its pre-training.

    A row gets a noise level ``t``, each of its tokens is masked with probability ``p(t)``, and the
    model names what was there. ``train/noise.py`` has the equations. Tokens whose ``loss_weights``
    are 0, a prompt, are never masked.

    Attributes:
        weighting: of a masked token: ``"bound"``, so that the loss is a bound on the negative
            log-likelihood (``1 / p`` on the linear schedule); ``"uniform"``, 1; ``"cart"``, more
            where visible tokens are near (Dream, arXiv 2508.15487).
        normalization: ``"token"``, a mean over all tokens that could have been masked; or
            ``"sequence"``, such a mean in every document and then over documents (fine-tuning).
        schedule: ``p(t)``: ``"linear"`` t, ``"poly2"`` t², ``"cosine"`` cos(π/2 (1 - t)).
        exact_ratio: mask one token at least, and take the share that was masked for ``p``.
        stratified: one ``t`` of a batch in each of as many equal intervals, instead of anywhere.
        complementary: read every row a second time with all other tokens masked.
        eps: the least mask probability, ``p = (1 - eps) p(t) + eps``; without exact ratio.
        band: the lowest and highest ``t``.
        random_length: probability that a step's rows are cut to a random length, one for all.
        eos_padding: padding behind a document becomes end-of-sequence tokens of it, up to the
            batch's longest row, that are learnt as any other (fine-tuning).
        sharpening: weight of the entropy of masked tokens that are guessed right already, so that
            more of them are sure at once when sampled (LLaDA2.0's CAP loss); 0 is none.
        max_logits: see :class:`NextToken`.
    """

    kind: ClassVar[str] = "masked_diffusion"

    weighting: Literal["bound", "uniform", "cart"] = "bound"
    normalization: Literal["token", "sequence"] = "token"
    schedule: Literal["linear", "poly2", "cosine"] = "linear"
    exact_ratio: bool = False
    stratified: bool = True
    complementary: bool = False
    eps: float = 1e-3
    band: tuple[float, float] = (0.0, 1.0)
    random_length: float = 0.01
    eos_padding: bool = False
    sharpening: float = 0.0
    max_logits: int = 2**27

    def __post_init__(self):
        require(
            self.weighting in ("bound", "uniform", "cart"),
            "objective.weighting",
            self.weighting,
            "use bound, uniform or cart",
        )
        require(
            self.normalization in ("token", "sequence"),
            "objective.normalization",
            self.normalization,
            "use token or sequence",
        )
        require(
            0 <= self.random_length <= 1,
            "objective.random_length",
            self.random_length,
            "must be a probability; 0.01 is published, 0 cuts nothing",
        )
        _check_noise(self)


@dataclasses.dataclass(frozen=True)
class BlockDiffusion:
    """Each block of a text from the blocks before it, all in one pass (arXiv 2503.09573).

    Blocks have ``model.block_size`` tokens and a noise level each. The model reads the masked text
    and the clean one beside it; see ``train/noise.py``.

    Attributes:
        schedule, stratified, eps, band, eos_padding, sharpening: as of :class:`MaskedDiffusion`,
            with a level for every block; strata are as many as a batch without padding has blocks.
        max_logits: see :class:`NextToken`.
    """

    kind: ClassVar[str] = "block_diffusion"

    schedule: Literal["linear", "poly2", "cosine"] = "linear"
    stratified: bool = True
    eps: float = 1e-3
    band: tuple[float, float] = (0.0, 1.0)
    eos_padding: bool = False
    sharpening: float = 0.0
    max_logits: int = 2**27

    def __post_init__(self):
        _check_noise(self)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """An autoencoder of chunks (CALM, arXiv 2510.27688, section 3): its tokens from its latent.

    ``K CE + kl_weight KL`` a chunk, ``KL = sum_i max(kl_floor, KL_i)`` over the latent's
    dimensions. Evaluation drops nothing. The defaults are published.

    Attributes:
        token_dropout: probability that a token is read as ``dropped_token_id``.
        latent_dropout: probability that a number of the latent is 0 (others grow for it).
        kl_weight: of the divergence from a standard normal.
        kl_floor: nats below which a dimension's divergence is not reduced; 0 clips nothing.
        dropped_token_id: what stands for a dropped token, a token like others.
        max_logits: see :class:`NextToken`.
    """

    kind: ClassVar[str] = "reconstruction"

    token_dropout: float = 0.15
    latent_dropout: float = 0.15
    kl_weight: float = 1e-3
    kl_floor: float = 0.5
    dropped_token_id: int = 0
    max_logits: int = 2**27

    def __post_init__(self):
        for name in ("token_dropout", "latent_dropout"):
            value = getattr(self, name)
            require(
                0 <= value < 1, f"objective.{name}", value, "must be in [0, 1); 0 drops nothing"
            )
        for name in ("kl_weight", "kl_floor"):
            value = getattr(self, name)
            require(
                value >= 0 and math.isfinite(value),
                f"objective.{name}",
                value,
                "must not be negative; 0 is off",
            )
        require(
            self.dropped_token_id >= 0,
            "objective.dropped_token_id",
            self.dropped_token_id,
            "must be a token's id",
        )
        require(self.max_logits > 0, "objective.max_logits", self.max_logits, "must be positive")


@dataclasses.dataclass(frozen=True)
class NextVector:
    """The next chunk's latent, of a model with a frozen autoencoder (CALM, arXiv 2510.27688).

    An energy head learns by the energy score of its draws and draws of the chunk's posterior; a
    diffusion or flow head by its own loss on the latter. The defaults are published.

    Attributes:
        num_samples: N: draws of an energy head for every chunk, at least 2; or of the posterior,
            for other heads.
        num_targets: M: draws of the posterior that an energy head's are compared with.
        alpha: exponent of the distances, in (0, 2): the score is strictly proper there.
        min_reconstruction: the share of tokens that the autoencoder has to give back, measured on
            the first batch of a new run; 0 asks for nothing.
    """

    kind: ClassVar[str] = "next_vector"

    num_samples: int = 8
    num_targets: int = 100
    alpha: float = 1.0
    min_reconstruction: float = 0.99

    def __post_init__(self):
        require(
            self.num_samples >= 2,
            "objective.num_samples",
            self.num_samples,
            "must be 2 or more: a score needs pairs",
        )
        require(
            self.num_targets >= 1, "objective.num_targets", self.num_targets, "must be 1 or more"
        )
        require(
            0 < self.alpha < 2,
            "objective.alpha",
            self.alpha,
            "must be in (0, 2); at 2 only means are learnt, 1 is published",
        )
        require(
            0 <= self.min_reconstruction <= 1,
            "objective.min_reconstruction",
            self.min_reconstruction,
            "must be a share of tokens, such as 0.99",
        )


Objective = NextToken | AutoDeco | MaskedDiffusion | BlockDiffusion | Reconstruction | NextVector

# Which way of making text each is for.
_DECODING = {
    NextToken: "next_token",
    AutoDeco: "next_token",
    MaskedDiffusion: "masked_diffusion",
    BlockDiffusion: "masked_diffusion",
    Reconstruction: "reconstruction",
    NextVector: "next_vector",
}
_WORDS = {
    "next_token": "predicts the next token; use next_token, or a model with a mask token, such as "
    "llada",
    "masked_diffusion": "fills in masks; use masked_diffusion, or block_diffusion with "
    "model.block_size",
    "reconstruction": "gives back what it reads; use reconstruction",
    "next_vector": "draws the next chunk's latent; use next_vector",
}


def check_decoding(objective: Objective, model: Any) -> None:
    """Refuse an objective that this model is not read by; ``model`` is None in a draft."""
    if model is None:
        return
    decoding = decoding_of(model)
    require(
        decoding == _DECODING[type(objective)],
        "objective",
        objective.kind,
        f"{type(model).__name__} here {_WORDS[decoding]}",
    )
    if isinstance(objective, Reconstruction):
        _check_id("objective.dropped_token_id", objective.dropped_token_id, model)
    if not isinstance(objective, MaskedDiffusion | BlockDiffusion):
        return
    blocks = isinstance(objective, BlockDiffusion)
    require(
        (model.block_size is not None) == blocks,
        "objective",
        objective.kind,
        f"model.block_size={model.block_size}: block_diffusion needs one, masked_diffusion none",
    )
    require(
        not objective.eos_padding or model.eos_token_id is not None,
        "objective.eos_padding",
        True,
        "model.eos_token_id is None; name the token that ends a text",
    )
    if objective.eos_padding:
        _check_id("model.eos_token_id", model.eos_token_id, model)


def _check_id(field: str, token: int, model: Any) -> None:
    """Of a token that no text need hold: no batch would show it to be outside the vocabulary."""
    require(
        0 <= token < model.vocab_size,
        field,
        token,
        f"is outside the vocabulary of {model.vocab_size}; name a token of it",
    )
