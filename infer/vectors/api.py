"""What ``generate`` and ``stream`` do with a model that draws the next chunk's vector."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ...errors import InputError
from ...model.handle import Model
from ..defaults import Settings, stop_ids
from ..driver import Run
from ..programs import program_of
from ..request import Batch, Prompts, make_batch, token_rows
from .step import NextVector
from .temperature import chunk_policies

REMAINDERS = ("error", "left", "right", "reject")


class VectorRun(Run):
    """A batch of chunks being decoded; warns of every row whose draws were too few."""

    _exhausted: frozenset[int] = frozenset()

    def _read(self) -> None:
        super()._read()
        flags = np.asarray(jax.device_get(self.state.records["exhausted"]))
        rows = frozenset(np.flatnonzero(flags[: self.batch.count].any(axis=1)).tolist())
        if rows - self._exhausted:
            self._exhausted |= rows
            warnings.warn(
                f"rows {sorted(rows)} used up max_draws at a chunk and took one that is not of "
                "the law asked for; raise the temperature or max_draws",
                stacklevel=4,
            )


def start(
    model: Model,
    prompts: Prompts,
    own: Settings,
    seed: int | Sequence[int],
    n: int,
    stop_tokens: Any,
    *,
    policy: Any = None,
    remainder: str | None = None,
    top_logprobs: int = 0,
    logprobs: str = "raw",
    grammar: Any = None,
    draft: Any = None,
) -> VectorRun:
    """The run of these requests.

    Args:
        model: that draws vectors.
        prompts, seed, n, stop_tokens: as for :func:`jaxalope.generate`.
        own: what the call goes by.
        policy: as the caller gave it, None if not.
        remainder: what becomes of prompts that are no whole chunks, one of ``REMAINDERS``; None is
            ``"error"``.
        top_logprobs, logprobs, grammar, draft: of ``generate``, which have no meaning here.

    Raises:
        InputError: an option that has no meaning here, a policy on logits, a prompt that is no
            whole chunks; names it and the remedy.
    """
    for name, given, remedy in (
        ("top_logprobs", top_logprobs != 0, "leave it out"),
        ("logprobs", logprobs != "raw", "leave it out"),
        ("grammar", grammar is not None, "leave it out, or choose among n=... samples"),
        ("draft", draft is not None, "leave it out: a step is a whole chunk already"),
    ):
        if given:
            raise InputError(
                f"{name} needs a likelihood, and model={type(model.config).__name__} draws whole "
                f"chunks without one; {remedy}"
            )
    rows = whole_rows(model, prompts, "error" if remainder is None else remainder)
    try:
        policies = chunk_policies(own.policy, len(rows))
    except InputError as error:
        if policy is not None:
            raise
        raise InputError(
            f"the model's own generation_config.json: {error}; or give policy=ExactTemperature(1.0)"
        ) from error
    eos = getattr(model.config, "eos_token_id", None)
    if stop_tokens is None:
        stop_tokens = stop_ids(model) or (() if eos is None else (eos,))
    batch = make_batch(
        model,
        rows,
        policies,
        own.max_new_tokens,
        seed,
        stop_tokens,
        max_length=own.max_length,
        decoding="next_vector",
    )
    batch = _on_chunks(batch, model.config.chunk_size)
    return VectorRun(model, program_of(model, NextVector, ()), batch, n, own.stop)


def whole_rows(model: Model, prompts: Prompts, remainder: str) -> list[list[int]]:
    """Every prompt as token ids, laid out as ``remainder`` says.

    ``"left"`` and ``"right"`` fill up to whole chunks with pad tokens, before or after the prompt;
    with ``"reject"`` rows stay as they are.

    Raises:
        InputError: an unknown ``remainder``, no whole chunks where it is ``"error"``, no pad token,
            or a prompt of less than a chunk where it is ``"reject"``.
    """
    if remainder not in REMAINDERS:
        raise InputError(f"remainder={remainder!r} is not one of {', '.join(REMAINDERS)}")
    size, pad = model.config.chunk_size, getattr(model.config, "pad_token_id", None)
    rows = [model.check_tokens(row).tolist() for row in token_rows(model, prompts)]
    for i, row in enumerate(rows):
        if not len(row) % size:
            continue
        if remainder == "error":
            raise InputError(
                f"prompts[{i}] has {len(row)} tokens, which are no whole chunks of {size}; give "
                "remainder='reject' (exact: draws until one begins with the rest), 'left' (pad "
                "tokens before the prompt) or 'right' (after it, as published), or other tokens"
            )
        if remainder == "reject":
            if len(row) < size:
                raise InputError(
                    f"prompts[{i}] has {len(row)} tokens, less than a chunk of {size}: there is "
                    "nothing to draw from; give remainder='left', or a longer prompt"
                )
            continue
        if pad is None:
            raise InputError(
                f"remainder={remainder!r} pads prompts[{i}], and the model has no pad token "
                "(model.autoencoder.pad_token_id); give remainder='reject', or whole chunks"
            )
        fill = [pad] * (-len(row) % size)
        rows[i] = fill + row if remainder == "left" else row + fill
    return rows


def _on_chunks(batch: Batch, chunk_size: int) -> Batch:
    """The batch on a canvas of whole chunks."""
    more = -batch.prompts.shape[1] % chunk_size
    return dataclasses.replace(
        batch,
        prompts=np.pad(batch.prompts, ((0, 0), (0, more))),
        capacity=batch.capacity + -batch.capacity % chunk_size,
    )
