"""What a model says of how it is to be sampled, where a caller says nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..model.generation_defaults import GenerationDefaults
from ..model.handle import Model
from .constraints import BadWords, LogitBias, MinNewTokens
from .penalties import NoRepeatNgram, RepetitionPenalty
from .policy import Chain, Greedy, Policy, Temperature
from .rows import is_single, token_ids
from .truncation import MinP, TopK, TopP, Typical

# Tokens that a row gets where neither the caller nor the model says how many.
MAX_NEW_TOKENS = 128
# What `transformers` takes, and so leaves out of the files that it writes.
_TOP_K = 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one call of ``generate`` goes by; its own arguments, and the model's for the others."""

    policy: Policy | Sequence[Policy]
    max_new_tokens: int | Sequence[int]
    max_length: int | None
    stop: tuple[str, ...]


def settle(
    model: Model,
    policy: Policy | Sequence[Policy] | None,
    max_new_tokens: int | Sequence[int] | None,
    max_length: int | None,
    stop_tokens: Any,
    stop: str | Sequence[str] | None,
) -> Settings:
    """Fill up what a caller left open, None each.

    Raises:
        InputError: one of the model's own settings is out of range, or what stops a row is no ids
            or no text; names it.
    """
    defaults = model.defaults
    if policy is None:
        stops = stop_ids(model) if stop_tokens is None else listed(stop_tokens)
        if stops and not np.isscalar(stops[0]):  # Ids for each prompt: each holds its own back.
            policy = [default_policy(defaults, [int(i) for i in row]) for row in stops]
        else:
            policy = default_policy(defaults, [int(i) for i in stops])
    if max_new_tokens is None:
        max_new_tokens = defaults.max_new_tokens
        # Of the model's two bounds the number of new tokens counts, if there is one.
        if max_new_tokens is None:
            max_new_tokens = MAX_NEW_TOKENS
            max_length = defaults.max_length if max_length is None else max_length
    if stop is None:
        stop = defaults.stops
    stop = (stop,) if isinstance(stop, str) else stop
    stop = tuple(stop) if isinstance(stop, Iterable) else stop
    if not (isinstance(stop, tuple) and all(isinstance(one, str) for one in stop)):
        raise InputError(f"stop={stop!r} must be a string, or a sequence of strings")
    return Settings(policy, max_new_tokens, max_length, stop)


def listed(stop_tokens: Any) -> list:
    """What stops rows as a list: of ids, or of lists of them, one for each prompt.

    Raises:
        InputError: they are no ids.
    """
    rows = [stop_tokens] if is_single(stop_tokens) else list(stop_tokens)
    rows = [row if is_single(row) else list(row) for row in rows]
    for row in rows:
        token_ids("stop_tokens", row)
    if len({is_single(row) for row in rows}) > 1:
        raise InputError(
            f"stop_tokens={stop_tokens!r} mixes ids and lists; give ids for all, or a list for each"
        )
    return [int(row) if is_single(row) else row for row in rows]


def stop_ids(model: Model) -> tuple[int, ...]:
    """The tokens that end a text: the model's own, or else its tokenizer's end-of-sequence."""
    own = model.defaults.stop_tokens
    if own is not None:
        return own
    eos = getattr(model.tokenizer, "eos_id", None)
    return () if eos is None else (eos,)


def default_policy(defaults: GenerationDefaults, stop_tokens: Sequence[int] = ()) -> Policy:
    """The policy that these settings describe; ``Temperature(1.0)`` if they say nothing.

    As ``transformers`` reads them, where ``do_sample`` is given: false is greedy, whatever else is
    said, and true has ``top_k=50`` if it does not say another. Where it is not given, any setting
    that only sampling has (a temperature, a truncation) means to sample with it.

    Args:
        defaults: of a model.
        stop_tokens: that end a text, and that ``min_new_tokens`` holds back.

    Raises:
        InputError: a setting is out of range; names it.
    """
    d, alone = defaults, {(int(token),) for token in stop_tokens}
    try:
        stages: list[Policy] = []
        if d.suppress_tokens:
            stages.append(LogitBias(dict.fromkeys(d.suppress_tokens, -math.inf)))
        # As in `transformers`, a text may end: a stop token by itself is no bad word.
        words = [word for word in d.bad_words_ids or () if tuple(word) not in alone]
        if words:
            stages.append(BadWords(words))
        if d.min_new_tokens and stop_tokens:
            stages.append(MinNewTokens(d.min_new_tokens, list(stop_tokens)))
        if d.repetition_penalty not in (None, 1):
            stages.append(RepetitionPenalty(d.repetition_penalty))
        if d.no_repeat_ngram_size:
            stages.append(NoRepeatNgram(d.no_repeat_ngram_size))
        if d.do_sample is False:
            stages.append(Greedy())
        else:
            stages.append(Temperature(1.0 if d.temperature is None else d.temperature))
            top_k = _TOP_K if d.do_sample and d.top_k is None else d.top_k
            if top_k:
                stages.append(TopK(top_k))
            if d.top_p not in (None, 1):
                stages.append(TopP(d.top_p))
            if d.min_p:
                stages.append(MinP(d.min_p))
            if d.typical_p not in (None, 1):
                stages.append(Typical(d.typical_p))
    except InputError as error:
        raise InputError(f"the model's own generation_config.json: {error}") from error
    return stages[0] if len(stages) == 1 else Chain(*stages)
