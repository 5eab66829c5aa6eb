"""What programs over the loop share on the host: compiled once a model, from prompts to text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

from ..model.handle import Model
from .loop import FINISH_REASONS, DecodeState
from .next_token import NextToken
from .request import Batch

Program = TypeVar("Program")

# Compiled programs, kept as long as their model is.
_PROGRAMS: weakref.WeakKeyDictionary[Model, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def program_of(model: Model, kind: Callable[..., Program], *settings: Hashable) -> Program:
    """``kind(model.graphdef, *settings)``, made once."""
    programs = _PROGRAMS.setdefault(model, {})
    if (kind, settings) not in programs:
        programs[kind, settings] = kind(model.graphdef, *settings)
    return programs[kind, settings]


def read_prompts(
    model: Model,
    decoder: NextToken,
    batch: Batch,
    many: Batch | None = None,
    rows: np.ndarray | None = None,
    *,
    params: Any = None,
    needs: frozenset[str] = frozenset(),
) -> DecodeState:
    """The state in which ``batch``'s prompts have been read, forked to ``many`` if that is given.

    Args:
        model: that reads them.
        decoder: its compiled functions.
        batch: the prompts.
        many: the rows to go on with.
        rows: the row of ``batch`` that each of ``many`` is forked from.
        params: what the decoder takes as parameters; the model's if None.
        needs: of the policy to come.
    """
    params = model.params if params is None else params
    with model.context():
        state = decoder.prefill(
            params,
            batch.prompts,
            batch.lengths,
            batch.limits,
            batch.seeds,
            batch.samples,
            capacity=batch.capacity,
            needs=needs,
        )
        if many is None:
            return state
        return decoder.fork(params, state, rows, many.limits, many.seeds, many.samples)


def responses(
    model: Model, batch: Batch, tokens: np.ndarray, lengths: np.ndarray, reasons: np.ndarray
) -> dict[str, list]:
    """What became of each request: ``tokens``, ``text`` and ``finish_reasons`` by name.

    Args:
        model: that drew them.
        batch: the requests; rows beyond its ``count`` are left out.
        tokens: canvases ``[B, T]``.
        lengths: of the rows, prompts included.
        reasons: why they ended.
    """
    drawn, text = [], []
    for row in range(batch.count):
        response = tokens[row, batch.lengths[row] : lengths[row]]
        spoken = response[~np.isin(response, batch.stop_tokens[row])]
        drawn.append(response)
        text.append("" if model.tokenizer is None else model.tokenizer.decode(spoken.tolist()))
    return {
        "tokens": drawn,
        "text": text,
        "finish_reasons": [FINISH_REASONS[r] for r in reasons[: batch.count]],
    }
