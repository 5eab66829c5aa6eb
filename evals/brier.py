"""The arithmetic of BrierLM: terms of one position, and from the sums of documents to a score.

``Brier(P, y) = 2 P(y) - sum over x of P(x)²`` is a strictly proper score of a law ``P`` at what
came true, and two draws estimate it without bias, whatever they are drawn by:
``1{x1 = y} + 1{x2 = y} - 1{x1 = x2}``. Brier-n is of the n tokens that follow a position; BrierLM
is 100 times the geometric mean of the means of Brier-1 to Brier-4. Source: "Continuous
Autoregressive Language Models", arXiv 2510.27688.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..errors import InputError

# The longest n-gram.
NGRAM = 4


def matches(first: Int[Array, "... n"], second: Int[Array, "... n"]) -> Bool[Array, "... n"]:
    """Whether the first 1, 2, ... tokens of both are the same."""
    return jnp.cumprod(first == second, axis=-1).astype(bool)


def sampled_terms(
    first: Int[Array, "... n"], second: Int[Array, "... n"], truth: Int[Array, "... n"]
) -> Float[Array, "... n"]:
    """Unbiased estimates of Brier-1 to Brier-n by two independent draws; float32 in -1, 0, 1, 2.

    Args:
        first, second: n tokens drawn after the same text.
        truth: the tokens that follow it.
    """
    right = matches(first, truth).astype(jnp.float32) + matches(second, truth)
    return right - matches(first, second)


def exact_terms(
    gold: Float[Array, "... n"], first: Int[Array, "... n"], second: Int[Array, "... n"], squares
) -> Float[Array, "... n"]:
    """Estimates of Brier-1 to Brier-n whose last factor is exact, for models with probabilities.

    Args:
        gold: the probability of each true token after the true ones before it.
        first, second: two draws of every token after the same text, ``first``'s tokens; the last
            of them do not matter.
        squares: the sum of squared probabilities of all tokens there.

    Returns:
        ``2 prod_{j<=n} gold_j - 1{the draws agree up to n - 1} squares_n``, float32.
    """
    agree = matches(first, second)[..., :-1]
    agree = jnp.concatenate([jnp.ones_like(agree[..., :1]), agree], axis=-1)
    return 2 * jnp.cumprod(gold, axis=-1) - agree * squares


@dataclasses.dataclass(frozen=True)
class BrierLM:
    """How well a model predicts text, without its likelihood.

    Attributes:
        score: BrierLM, 100 times the geometric mean of ``factors``, 100 at best; 0 where a factor
            is not positive.
        score_error: its standard error, by first-order propagation from documents; NaN where
            ``score`` is 0 by such a factor.
        factors: means of Brier-1 to Brier-4 over positions, ``[4]`` float64.
        standard_errors: of the factors. Documents are taken as independent, the positions of one
            are not; NaN where there is one document.
        not_positive: the n whose Brier-n is 0 or less. Their estimate says that the model is no
            better than noise there, or that there were too few positions; BrierLM says nothing.
        positions: that were scored.
        documents: that they are in.
        exact_last: the form of the estimate, see :func:`exact_terms`; otherwise of two draws.
    """

    score: float
    score_error: float
    factors: np.ndarray
    standard_errors: np.ndarray
    not_positive: tuple[int, ...]
    positions: int
    documents: int
    exact_last: bool = False

    @classmethod
    def of(
        cls, sums: Any, weights: Any, positions: int | None = None, *, exact_last: bool = False
    ) -> BrierLM:
        """From what each document adds up to.

        Args:
            sums: of the weighted terms of each document's positions, ``[documents, 4]``.
            weights: that its positions sum up to, ``[documents]``.
            positions: how many there are in all; the sum of the weights if None.
            exact_last: see the class.

        Raises:
            InputError: no document has a position.
        """
        sums, weights = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
        sums, weights = sums[weights > 0], weights[weights > 0]
        if not len(weights):
            raise InputError(
                f"documents hold no position to score: none has {NGRAM} tokens after a token (or "
                "a chunk) to begin with; give longer ones"
            )
        total, count = weights.sum(), len(weights)
        factors = sums.sum(axis=0) / total
        # What each document moves the mean by; a mean of ratios would count short ones as long.
        moves = (sums - factors * weights[:, None]) / total
        bad = tuple(int(n) + 1 for n in np.flatnonzero(factors <= 0))
        if bad:
            score = 0.0
            score_moves = np.full(count, np.nan)
        else:
            score = 100 * math.exp(np.log(factors).mean())
            score_moves = score * (moves / factors).mean(axis=1)
        return cls(
            score=score,
            score_error=float(_error(score_moves)),
            factors=factors,
            standard_errors=_error(moves),
            not_positive=bad,
            positions=round(total) if positions is None else positions,
            documents=count,
            exact_last=exact_last,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values; what is not a number is null."""
        values = dataclasses.asdict(self)
        values["not_positive"] = list(self.not_positive)
        for name in ("factors", "standard_errors"):
            values[name] = [_number(x) for x in values[name]]
        return values | {"score_error": _number(self.score_error)}

    def __str__(self) -> str:
        """A table for people."""
        lines = [
            f"Brier-{n + 1}  {factor: .5f} +- {error:.5f}"
            for n, (factor, error) in enumerate(
                zip(self.factors, self.standard_errors, strict=True)
            )
        ]
        if self.not_positive:
            names = ", ".join(f"Brier-{n}" for n in self.not_positive)
            lines.append(f"BrierLM   0: {names} not above 0, so there is no score")
        else:
            lines.append(f"BrierLM  {self.score: .3f} +- {self.score_error:.3f}")
        form = "exact last factor" if self.exact_last else "two draws"
        lines.append(f"{self.positions} positions of {self.documents} documents, {form}")
        return "\n".join(lines)


def _error(moves: np.ndarray) -> np.ndarray:
    """The standard error of a mean that each document moves by so much."""
    count = len(moves)
    if count < 2:
        return np.full(moves.shape[1:], np.nan)
    return np.sqrt(count / (count - 1) * np.sum(moves**2, axis=0))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
