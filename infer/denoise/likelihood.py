"""A bound on the likelihood of answers, by masks drawn at random.

``log p(answer | prompt) >= -E[(A / l) * sum over masked of the cross-entropy]``, where ``l`` is
uniform in ``1..A`` and ``l`` of the answer's ``A`` tokens are masked. The right side is the mean
log-likelihood over all orders in which the answer may be spelled. Source: LLaDA (arXiv 2502.09992),
equation 6 and appendix A.2; an exact number of masks varies less than masks drawn one by one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...errors import InputError
from ...model.handle import Model
from ...sharding import Params, constrain, kernel_map
from ..programs import program_of
from ..request import Prompts, bucket
from .settings import check_guidance, mask_of, prompt_rows

_ROWS = ("batch", None)


@dataclasses.dataclass(frozen=True)
class Bound:
    """Estimates of a lower bound on log-likelihoods, in nats.

    Attributes:
        value: ``[N]`` float64, of each whole answer; unbiased for the bound.
        standard_error: ``[N]``, from the spread of batches of draws; NaN where there was one batch.
        n_mc: draws of each.
    """

    value: np.ndarray
    standard_error: np.ndarray
    n_mc: int


def diffusion_log_likelihood(
    model: Model,
    prompts: Prompts,
    answers: Prompts,
    *,
    n_mc: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    seed: int = 0,
) -> Bound:
    """Estimate a lower bound on ``log p(answer | prompt)`` of each pair.

    Pair ``i`` is drawn for by ``seed + i``, whatever the others are. Within a batch of draws the
    numbers of masks are spread evenly over ``1..A`` from a common random start.

    Args:
        model: a masked diffusion model.
        prompts: text, or token ids; of any lengths, also empty.
        answers: one for each prompt, at least a token long.
        n_mc: draws of each pair, a multiple of ``batch_size`` or less than it.
        batch_size: rows that the model reads at once.
        cfg_scale: of classifier-free guidance; 0 is none.
        seed: of the first pair.

    Raises:
        InputError: a model that fills no masks in, unequal numbers of prompts and answers, an empty
            answer or one that holds masks, numbers that do not divide; names the field.
    """
    mask = mask_of(model)
    if getattr(model.config, "block_size", None) is not None:
        raise InputError(
            f"model.block_size={model.config.block_size}: this bound is of models that see "
            "the whole text; one of block diffusion bounds each block given the text before it"
        )
    rows, wanted = prompt_rows(model, prompts), _answers(model, answers)
    if len(rows) != len(wanted):
        raise InputError(
            f"answers has {len(wanted)} entries for {len(rows)} prompts; give one each"
        )
    for i, answer in enumerate(wanted):
        if not len(answer) or np.any(answer == mask):
            raise InputError(
                f"answers[{i}] is empty or holds a mask; the likelihood is of a whole text"
            )
    if n_mc < 1 or batch_size < 1:
        raise InputError(f"{n_mc=} and {batch_size=} must be at least 1")
    batch_size = min(batch_size, n_mc)
    if n_mc % batch_size:
        raise InputError(
            f"{n_mc=} is not a multiple of {batch_size=}; batches of draws are all alike"
        )
    scale = check_guidance(cfg_scale, rows, mask)
    padded = -(-batch_size // model.batch_ways()) * model.batch_ways()
    width = bucket(max(len(p) + len(a) for p, a in zip(rows, wanted, strict=True)))
    scorer = program_of(model, Scorer, mask, bool(np.any(scale)))
    means = []
    for i, (prompt, answer) in enumerate(zip(rows, wanted, strict=True)):
        rng = np.random.default_rng((seed + i) % 2**64)
        text = np.zeros((padded, width), np.int32)
        text[:, : len(prompt) + len(answer)] = np.concatenate([prompt, answer])
        lengths = np.full((2, padded), [[len(prompt)], [len(prompt) + len(answer)]], np.int32)
        own = []
        for _ in range(n_mc // batch_size):
            counts = spread_counts(rng, len(answer), batch_size)
            hidden = np.zeros(text.shape, bool)
            hidden[:batch_size, len(prompt) : lengths[1, 0]] = hide(rng, counts, len(answer))
            with model.context():
                nats = scorer.score(model.params, text, hidden, *lengths, np.float32(scale[i]))
            nats = np.asarray(nats, np.float64)[:batch_size]
            own.append(np.mean(nats * len(answer) / counts))
        means.append(own)
    means = np.array(means)
    with np.errstate(invalid="ignore", divide="ignore"):
        count = means.shape[1]
        spread = np.sqrt(means.var(axis=1) * count / (count - 1) / count)
    return Bound(means.mean(axis=1), spread, n_mc)


def spread_counts(rng: np.random.Generator, answer: int, batch: int) -> np.ndarray:
    """Numbers of masks ``[batch]``, each uniform in ``1..answer``, together spread evenly."""
    start = rng.integers(1, answer + 1)
    # Halves are rounded up, so that a shift moves every start alike and each stays uniform.
    shift = np.floor(np.arange(batch) * answer / batch + 0.5).astype(int)
    return (start + shift - 1) % answer + 1


def hide(rng: np.random.Generator, counts: np.ndarray, answer: int) -> np.ndarray:
    """``[batch, answer]``: so many positions of each row, every set of them as likely."""
    order = rng.permuted(np.tile(np.arange(answer), (len(counts), 1)), axis=1)
    return order < counts[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """The compiled scores of hidden tokens under one model structure.

    Attributes:
        graphdef: the model's structure.
        mask: id of the mask.
        guided: classifier-free guidance is used.
    """

    graphdef: nnx.GraphDef
    mask: int
    guided: bool = False

    @functools.cached_property
    def score(self):
        """Jitted :meth:`_score`, its model given as ``params``."""
        return jax.jit(self._score)

    def _score(
        self,
        params: Params,
        text: Int[Array, "B T"],
        hidden: Bool[Array, "B T"],
        prompt_length: Int[Array, "B"],
        length: Int[Array, "B"],
        scale: Any,
    ) -> Float[Array, "B"]:
        """Log-probabilities of the hidden tokens of each row, summed, in nats."""
        model = nnx.merge(self.graphdef, params)
        text, hidden = (constrain(x, *_ROWS) for x in (text, hidden))
        prompt_length, length = (constrain(x, "batch") for x in (prompt_length, length))
        place = jnp.arange(text.shape[1])
        exists = (place < length[:, None]).astype(jnp.int32)
        noisy = jnp.where(hidden, self.mask, text)

        def logits(tokens):
            states, _, _ = model.hidden_states(tokens, segment_ids=exists)
            return constrain(model.logits(states), "batch", None, None)

        said = logits(noisy)
        if self.guided:
            free = logits(jnp.where(place < prompt_length[:, None], self.mask, noisy))
            said = free + (scale + 1) * (said - free)
        if getattr(model.config, "logit_shift", False):
            said = jnp.concatenate([said[:, :1], said[:, :-1]], axis=1)

        def local(said, text, hidden):
            own = jnp.take_along_axis(said, text[:, :, None], axis=2)[:, :, 0]
            nats = own - jax.nn.logsumexp(said, axis=-1)
            return jnp.sum(jnp.where(hidden, nats, 0.0), axis=1)

        return kernel_map(local, (("batch", None, None), _ROWS, _ROWS), ("batch",))(
            said, text, hidden
        )


def _answers(model: Model, answers: Prompts) -> list[np.ndarray]:
    """Token ids; an answer begins no text, so it has no begin token."""
    if isinstance(answers, str):
        answers = [answers]
    rows: list[np.ndarray] = []
    for answer in answers:
        ids: Sequence[int] = answer
        if isinstance(answer, str):
            if model.tokenizer is None:
                raise InputError("this model has no tokenizer; give answers as token ids")
            ids = model.tokenizer.encode(answer)
        rows.append(model.check_tokens(np.asarray(ids, np.int32)) if len(ids) else np.zeros(0, int))
    return rows
