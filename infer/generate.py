"""``generate``: prompts in, text out. The host side of decoding."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..model.handle import Model
from .loop import FINISH_REASONS, DecodeState
from .next_token import NextToken
from .policy import Policy, Temperature

# Prompts and canvases are padded to a multiple of this, so that few shapes are ever compiled.
_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, one entry a prompt.

    Attributes:
        tokens: the new token ids, a stop token included where one was drawn.
        text: the new tokens decoded, without the stop token.
        logprobs: of each new token under the model itself, float32.
        finish_reasons: ``"stop"`` (drew a stop token) or ``"length"``.
    """

    tokens: list[np.ndarray]
    text: list[str]
    logprobs: list[np.ndarray]
    finish_reasons: list[str]


def generate(
    model: Model,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    policy: Policy | None = None,
    max_new_tokens: int = 128,
    seed: int | Sequence[int] = 0,
    *,
    stop_tokens: Sequence[int] | None = None,
) -> Generation:
    """Continue each prompt.

    Args:
        model: as :func:`jaxalope.load` returns it.
        prompts: text, or token ids; of any lengths.
        policy: that tokens are drawn by; ``Temperature(1.0)`` if None.
        max_new_tokens: that a row may get.
        seed: one a prompt, or an int: prompt ``i`` then has seed ``seed + i``. A prompt's tokens
            depend on its own seed only, not on its neighbours.
        stop_tokens: ids that end a row; the tokenizer's end-of-sequence if None.

    Raises:
        InputError: no prompt, an empty prompt of a model without a begin- or end-of-sequence token,
            an id outside the vocabulary, or a count that is not positive.
    """
    policy = policy or Temperature(1.0)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    rows = [model.check_tokens(row) for row in _token_rows(model, prompts)]
    seeds = [seed + i for i in range(len(rows))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(rows):
        raise InputError(f"seed has {len(seeds)} entries for {len(rows)} prompts; give one each")
    if stop_tokens is None:
        eos = getattr(model.tokenizer, "eos_id", None)
        stop_tokens = () if eos is None else (eos,)

    # A mesh takes whole shares of the batch: copies of the last prompt, done from the start,
    # fill the last one up.
    count = len(rows)
    extra = -count % model.batch_ways()
    rows, seeds = rows + [rows[-1]] * extra, seeds + [0] * extra
    lengths = np.array([len(row) for row in rows], np.int32)
    width = _bucket(int(lengths.max()))
    prompt = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        prompt[i, : len(row)] = row
    limits = np.where(np.arange(len(rows)) < count, lengths + max_new_tokens, lengths)
    limits = limits.astype(np.int32)
    # An id that no token has stands for "no stop token", so that the shape is never empty.
    stops = np.array(tuple(stop_tokens) or (-1,), np.int32)

    decoder = _decoder(model, policy)
    with model.context():
        state = decoder.prefill(
            model.params,
            prompt,
            lengths,
            limits,
            np.array(seeds, np.uint32),
            capacity=_bucket(int(limits.max())),
        )
        state = decoder.decode(model.params, state, stops, jnp.int32(max_new_tokens))
    return _collect(model, state, lengths[:count], set(stops.tolist()))


# Compiled decoders, kept as long as their model is.
_DECODERS: weakref.WeakKeyDictionary[Model, dict[Policy, NextToken]] = weakref.WeakKeyDictionary()


def _decoder(model: Model, policy: Policy) -> NextToken:
    decoders = _DECODERS.setdefault(model, {})
    if policy not in decoders:
        decoders[policy] = NextToken(model.graphdef, policy)
    return decoders[policy]


def _bucket(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _token_rows(model: Model, prompts) -> list[Sequence[int]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if not len(prompts):
        raise InputError("prompts is empty; give at least one")
    tokenizer, rows = model.tokenizer, []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise InputError("this model has no tokenizer; give prompts as token ids")
            prompt = tokenizer.encode(prompt)
            begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            # A model that never saw a begin token still needs something to begin an empty text.
            if begin is not None and (model.add_bos or not prompt):
                prompt = [begin, *prompt]
        if not len(prompt):
            raise InputError(
                f"prompts[{i}] is empty and the model has no token to begin with; give it text"
            )
        rows.append(prompt)
    return rows


def _collect(model: Model, state: DecodeState, lengths: np.ndarray, stops: set[int]) -> Generation:
    tokens, logprobs, ends, reasons = jax.device_get(
        (state.tokens, state.logprobs, state.length, state.reason)
    )
    spans = [slice(start, end) for start, end in zip(lengths, ends, strict=False)]
    new = [row[span] for row, span in zip(tokens, spans, strict=False)]
    spoken = [[int(t) for t in row if int(t) not in stops] for row in new]
    decode = (lambda _: "") if model.tokenizer is None else model.tokenizer.decode
    return Generation(
        tokens=new,
        text=[decode(row) for row in spoken],
        logprobs=[row[span] for row, span in zip(logprobs, spans, strict=False)],
        finish_reasons=[FINISH_REASONS[reason] for reason in reasons[: len(lengths)]],
    )
