"""``brier_lm``: one score for every model of the zoo, with or without a likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from ..errors import InputError
from ..infer.programs import program_of
from ..model.handle import Model
from ..model.registry import decoding_of
from .brier import NGRAM, BrierLM, sampled_terms
from .documents import Documents, batches_of, documents_of, starts_of
from .samplers import DenoisingSampler, Sampler
from .tokens import TokenScorer
from .vectors import VectorScorer


def brier_lm(
    model: Model | None,
    documents: Documents,
    *,
    sampler: Sampler | None = None,
    exact_last: bool | None = None,
    num_positions: int | None = 64,
    max_length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> BrierLM:
    """How well a model predicts the four tokens that follow, from draws alone.

    A next-token model draws token by token, a next-vector model (CALM) chunk by chunk, a masked
    diffusion model fills four masks in, given only what stands before; and anything else that
    draws four tokens after a text is scored as a ``sampler``. Every document is read alone, and
    its draws are a function of its own seed and of the place: not of packing, batches or
    neighbours.

    Args:
        model: as :func:`jaxalope.load` returns it. None with a sampler and token ids.
        documents: texts, sequences of token ids, or packed batches such as
            :func:`~..data.pipeline.eval_batches` yields; see :func:`.documents.documents_of`.
        sampler: draws instead of the model; for masked diffusion :class:`DenoisingSampler` if None.
        exact_last: the last token of each n-gram by its probability instead of by draws, which
            varies less. For next-token models, where None is True. The model's own distribution is
            scored, without a policy.
        num_positions: n-grams of each document that are scored, at even distances from a random
            start; every document counts by how many it has. None is all. Of a CALM model
            n-grams begin with chunks.
        max_length: longer documents are cut into pieces of so many tokens.
        batch_size: documents that the model reads at once; prefixes, with a sampler.
        seed: of the first document; document ``i`` has ``seed + i``.

    Raises:
        InputError: no n-gram to score, a model that makes no text, or a setting that does not fit;
            names it.
    """
    _check(num_positions, batch_size, seed)
    kind = None if model is None else decoding_of(model.config)
    if sampler is None:
        if model is None:
            raise InputError("model=None: give a model, or a sampler that draws")
        if kind == "masked_diffusion":
            sampler = DenoisingSampler(model)
    if exact_last and (sampler is not None or kind != "next_token"):
        raise InputError(
            "exact_last=True takes the probability of every next token, and here there are draws "
            "only (a sampler, masked diffusion, or a next-vector model); leave it out"
        )
    rows = documents_of(model, documents, max_length)
    size = model.config.chunk_size if sampler is None and kind == "next_vector" else 1
    starts = [starts_of(len(row), size, num_positions, seed + i) for i, row in enumerate(rows)]
    if sampler is not None:
        exact_last = False
        means = _sampled(sampler, rows, starts, batch_size, seed)
    elif kind == "next_vector":
        exact_last = False
        scorer = program_of(model, VectorScorer)
        means = _scored(model, scorer, rows, starts, size, batch_size, seed)
    elif kind == "next_token":
        exact_last = exact_last is None or exact_last
        scorer = program_of(model, TokenScorer, exact_last)
        means = _scored(model, scorer, rows, starts, size, batch_size, seed)
    else:
        raise InputError(
            f"model={type(model.config).__name__} makes no text (it does {kind}); score a model "
            "that predicts, such as the CALM model that it is a part of"
        )
    sums, weights = np.zeros((len(rows), NGRAM)), np.zeros(len(rows))
    for i, mean in means:
        # A document counts by all its n-grams, however few of them were looked at.
        weights[i] = (len(rows[i]) - NGRAM) // size
        sums[i] = weights[i] * mean
    return BrierLM.of(sums, weights, sum(map(len, starts)), exact_last=exact_last)


def _check(num_positions: int | None, batch_size: int, seed: int) -> None:
    for name, value in (("num_positions", num_positions), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} must be from 0 to 2**32 - 1")


def _scored(
    model: Model,
    scorer: TokenScorer | VectorScorer,
    rows: Sequence[np.ndarray],
    starts: Sequence[np.ndarray],
    size: int,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """The mean terms of each document that has any, and its number."""
    settings = {"size": size, "batch_size": batch_size, "ways": model.batch_ways()}
    for batch in batches_of(rows, starts, seed, **settings):
        with model.context():
            terms = scorer.terms(
                model.params,
                batch.tokens,
                batch.lengths,
                batch.starts,
                batch.seeds,
                gap=batch.gap,
            )
        terms = np.asarray(jax.device_get(terms), np.float64)
        for row, i in enumerate(batch.rows):
            if i >= 0:
                yield i, terms[row, : batch.picked[row]].mean(axis=0)


def _sampled(
    sampler: Sampler,
    rows: Sequence[np.ndarray],
    starts: Sequence[np.ndarray],
    batch_size: int,
    seed: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """As :func:`_scored`, of whatever draws four tokens after a prefix."""
    places = [(i, int(start)) for i, own in enumerate(starts) for start in own]
    # Prefixes of about a length together: a batch is as wide as its longest.
    places.sort(key=lambda place: place[1])
    terms: dict[int, list[np.ndarray]] = {}
    for first in range(0, len(places), batch_size):
        own = places[first : first + batch_size]
        # Filled up by copies, so that few shapes are compiled.
        filled = own + own[-1:] * (min(batch_size, len(places)) - len(own))
        prefixes = [rows[i][:start] for i, start in filled]
        truth = np.stack([rows[i][start : start + NGRAM] for i, start in own])
        draws = []
        for draw in range(2):
            seeds = [_seed(seed + i, start, draw) for i, start in filled]
            drawn = np.asarray(sampler.sample(prefixes, seeds))
            if drawn.shape != (len(filled), NGRAM) or not np.issubdtype(drawn.dtype, np.integer):
                raise InputError(
                    f"sampler={type(sampler).__name__} returned {drawn.dtype} {drawn.shape}; "
                    f"{len(filled)} rows of {NGRAM} token ids were asked for"
                )
            draws.append(drawn[: len(own)])
        for (i, _), term in zip(own, np.asarray(sampled_terms(*draws, truth)), strict=True):
            terms.setdefault(i, []).append(term)
    for i, own in terms.items():
        yield i, np.mean(own, axis=0, dtype=np.float64)


def _seed(document: int, start: int, draw: int) -> int:
    """Of a draw, below 2**32."""
    return int(np.random.SeedSequence((document, start, draw)).generate_state(1)[0])
