"""One answer from several samples: best of n, and self-consistency. Host side."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from ..errors import InputError


@dataclasses.dataclass(frozen=True)
class Vote:
    """What a prompt's samples agree on.

    Attributes:
        answer: the most frequent one; None if no sample has any.
        index: the likeliest sample that gives it, counted within the prompt; None without answer.
        votes: how many samples give it.
        share: of the samples that have an answer.
        answers: of every sample; None where it has none.
    """

    answer: Hashable | None
    index: int | None
    votes: int
    share: float
    answers: list[Hashable | None]


def best_of_n(
    text: Sequence[str],
    logprobs: Sequence[np.ndarray] | Sequence[float] | None,
    n: int,
    verifier: Callable[[str], float] | None = None,
) -> list[int]:
    """For each prompt, the index into ``text`` of its best sample.

    Args:
        text: of all samples, those of a prompt together, as ``generate(..., n=n)`` returns them.
        logprobs: of each sample's tokens; or one number a sample. None where the model has no
            likelihood: the verifier decides, then the order.
        n: samples a prompt.
        verifier: scores a text; the mean log-probability of its tokens decides if None, and
            between texts of the same score.

    Raises:
        InputError: the samples are no multiple of ``n``, or nothing decides between them.
    """
    groups = _groups(len(text), n)
    if logprobs is None:
        if verifier is None:
            raise InputError("logprobs is None: a model without a likelihood needs a verifier")
        logprobs = np.zeros(len(text))
    scores = [0.0 if verifier is None else float(verifier(t)) for t in text]
    means = [float(np.mean(x)) if np.size(x) else -np.inf for x in logprobs]
    return [max(group, key=lambda i: (scores[i], means[i])) for group in groups]


def self_consistency(
    text: Sequence[str],
    logprobs: Sequence[np.ndarray] | Sequence[float] | None,
    n: int,
    extract: Callable[[str], Hashable | None] | None = None,
) -> list[Vote]:
    """For each prompt, the answer that most of its samples give (arXiv 2203.11171).

    Args:
        text: of all samples, those of a prompt together.
        logprobs: of each sample's tokens; or one number a sample, the sum. None where the model
            has no likelihood: all are as likely.
        n: samples a prompt.
        extract: the answer in a text, None where there is none; :func:`boxed_answer` if None.
            Samples without an answer have no vote. Among answers of as many votes, the one whose
            samples are likelier together is chosen.

    Raises:
        InputError: the samples are no multiple of ``n``.
    """
    extract = extract or boxed_answer
    logprobs = np.zeros(len(text)) if logprobs is None else logprobs
    votes = []
    for group in _groups(len(text), n):
        answers = [extract(text[i]) for i in group]
        totals = [float(np.sum(logprobs[i])) for i in group]
        tally: dict[Hashable, list[int]] = {}
        for place, answer in enumerate(answers):
            if answer is not None:
                tally.setdefault(answer, []).append(place)
        if not tally:
            votes.append(Vote(None, None, 0, 0.0, answers))
            continue

        def weight(answer, tally=tally, totals=totals):
            places = tally[answer]
            return len(places), float(np.logaddexp.reduce([totals[i] for i in places]))

        winner = max(tally, key=weight)
        places = tally[winner]
        index = max(places, key=lambda i, totals=totals: totals[i])
        share = len(places) / sum(map(len, tally.values()))
        votes.append(Vote(winner, index, len(places), share, answers))
    return votes


def boxed_answer(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}``, braces matched; None without a complete one."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def _groups(count: int, n: int) -> list[range]:
    if n < 1 or count % n:
        raise InputError(f"n={n} does not divide the {count} samples; give the n they came with")
    return [range(i, i + n) for i in range(0, count, n)]
