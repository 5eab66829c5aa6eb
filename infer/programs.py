"""What programs over the loop share on the host: they are compiled once a model, and give text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

from ..model.handle import Model
from .loop import FINISH_REASONS
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
