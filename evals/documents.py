"""Texts to documents, and which of their positions are scored.

Every model reads a document alone: what a packed row holds is taken apart first. So a score is a
function of the documents, not of how they were packed or batched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..infer.request import bucket, token_rows
from ..infer.rows import power_of_two
from ..model.handle import Model
from .brier import NGRAM

Documents = str | Mapping[str, Any] | Iterable[str | Sequence[int] | Mapping[str, Any]]


def documents_of(
    model: Model | None, documents: Documents, max_length: int | None = None
) -> list[np.ndarray]:
    """Token ids of every document, ``[n]`` int32 each, in the order in which they stand.

    Padding ids at a document's end (``DataConfig.align``) are no text and are left out.

    Args:
        model: whose tokenizer and vocabulary they are of; None takes token ids as they are.
        documents: texts, sequences of token ids, or packed batches (``tokens [B, T]``, optionally
            ``segment_ids [B, T]``, where 0 is padding and a change of id begins a document).
        max_length: tokens that a document may have; longer ones are cut into pieces. None: any.

    Raises:
        InputError: there is none, an id is outside the vocabulary, or something else was given.
    """
    if max_length is not None and max_length <= NGRAM:
        raise InputError(f"max_length={max_length} must be above {NGRAM}, which are predicted")
    found, pad = [], _pad_of(model)
    for ids in _rows(model, documents):
        if len(ids):
            ids = np.asarray(ids) if model is None else model.check_tokens(ids)
            ids = ids[: 1 + int(np.max(np.flatnonzero(ids != pad), initial=-1))]
        piece = max_length or max(len(ids), 1)
        found += [np.asarray(ids[i : i + piece], np.int32) for i in range(0, len(ids), piece)]
    if not found:
        raise InputError("documents is empty; give texts, token ids or packed batches")
    return found


def _rows(model: Model | None, documents: Documents) -> Iterator[Any]:
    if isinstance(documents, str | Mapping):
        documents = [documents]
    for number, one in enumerate(documents):
        if isinstance(one, Mapping):
            yield from unpack(one)
        elif isinstance(one, str):
            if model is None:
                raise InputError(
                    f"documents[{number}] is a text, which takes a model with a tokenizer; give "
                    "token ids"
                )
            yield token_rows(model, [one])[0] if one else []
        elif np.ndim(one) == 1:
            yield one
        else:
            raise InputError(
                f"documents[{number}] is a {type(one).__name__}; give a text, a sequence of token "
                "ids, or a batch with 'tokens' and 'segment_ids'"
            )


def _pad_of(model: Model | None) -> int:
    """The id that fills texts up; -1 where there is none, or where it ends texts too."""
    if model is None:
        return -1

    def known(name, own):
        of_text = getattr(model.tokenizer, name, None)
        return getattr(model.config, own, None) if of_text is None else of_text

    pad = known("pad_id", "pad_token_id")
    return -1 if pad is None or pad == known("eos_id", "eos_token_id") else int(pad)


def unpack(batch: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The documents of packed rows, row by row.

    Raises:
        InputError: there are no tokens, or the segments are not theirs.
    """
    if "tokens" not in batch:
        raise InputError(f"documents: a batch with {sorted(batch)} has no 'tokens'")
    tokens = np.asarray(batch["tokens"])
    segments = batch.get("segment_ids")
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    if tokens.ndim != 2 or tokens.shape != segments.shape:
        raise InputError(
            f"documents: a batch has tokens {tokens.shape} and segment_ids {segments.shape}; both "
            "are [B, T]"
        )
    for row, ids in zip(tokens, segments, strict=True):
        row, ids = row[ids != 0], ids[ids != 0]
        if len(row):
            yield from np.split(row, np.flatnonzero(np.diff(ids)) + 1)


def starts_of(length: int, size: int, num_positions: int | None, seed: int) -> np.ndarray:
    """Where the scored n-grams of a document begin, in units of ``size`` tokens, ascending.

    They begin with a unit, have one before them to be predicted from, and end inside. Of more than
    ``num_positions`` so many are taken at even distances from a random start: each is as likely.

    Args:
        length: tokens of the document.
        size: tokens of a chunk; 1 for models of tokens.
        num_positions: at most; None is all.
        seed: of the document.
    """
    count = max((length - NGRAM) // size, 0)
    if num_positions is None or count <= num_positions:
        return np.arange(1, count + 1)
    begin = np.random.default_rng(seed % 2**64).random()
    picked = np.floor((np.arange(num_positions) + begin) * count / num_positions)
    return 1 + np.minimum(picked.astype(int), count - 1)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Documents as rows, padded so that few shapes are compiled.

    Attributes:
        rows: the number of each row's document; -1 fills the batch up.
        tokens: ``[B, T]`` int32, each document first in its row; ``T`` is whole units.
        lengths: ``[B]`` int32, of the documents.
        starts: ``[B, P]`` int32, units; the last is repeated.
        picked: ``[B]``, how many of them there are.
        seeds: ``[B]`` uint32.
        gap: no two neighbouring starts, nor the first and 1, are further apart.
    """

    rows: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    picked: np.ndarray
    seeds: np.ndarray
    gap: int


def batches_of(
    documents: Sequence[np.ndarray],
    starts: Sequence[np.ndarray],
    seed: int,
    *,
    size: int,
    batch_size: int,
    ways: int,
) -> Iterator[Batch]:
    """The documents that have starts, those of about a length together.

    Args:
        documents: of :func:`documents_of`.
        starts: of :func:`starts_of`, for each.
        seed: of the first document; document ``i`` has ``seed + i``.
        size: tokens of a unit.
        batch_size: documents at once, at most, rounded up to a multiple of ``ways``.
        ways: shares that a mesh splits a batch into.
    """
    order = [i for i in range(len(documents)) if len(starts[i])]
    if not order:
        return
    order.sort(key=lambda i: len(documents[i]))
    rows = -(-min(batch_size, len(order)) // ways) * ways
    for first in range(0, len(order), rows):
        own = order[first : first + rows]
        width = -(-bucket(max(len(documents[i]) for i in own)) // size) * size
        most, room = max(len(starts[i]) for i in own), (width - NGRAM) // size
        # What is compiled goes by the width, not by where the starts of these documents are.
        gap = power_of_two(-(-room // most))
        most = min(power_of_two(most), room)
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        places, picked = np.ones((rows, most), np.int32), np.zeros(rows, np.int32)
        numbers, seeds = np.full(rows, -1), np.zeros(rows, np.uint32)
        for row, i in enumerate(own):
            tokens[row, : len(documents[i])] = documents[i]
            places[row] = np.pad(starts[i], (0, most - len(starts[i])), mode="edge")
            lengths[row], picked[row] = len(documents[i]), len(starts[i])
            numbers[row], seeds[row] = i, (seed + i) % 2**32
        yield Batch(numbers, tokens, lengths, places, picked, seeds, gap)
