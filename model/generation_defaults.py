"""What a published model says of how it is to be sampled: ``generation_config.json``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import InputError

# Fields that have no bearing on what is drawn here: bookkeeping, caches, drafts, what is returned,
# and settings of decoders that are chosen by hand.
_NO_BEARING = frozenset(
    {
        "_from_model_config",
        "bos_token_id",
        "decoder_start_token_id",
        "early_stopping",
        "length_penalty",
        "num_return_sequences",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "transformers_version",
        "use_model_defaults",
        *("cache_config", "cache_implementation", "max_cache_len", "use_cache"),
        *("compile_config", "disable_compile", "prefill_chunk_size", "continuous_batching_config"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "use_mtp"),
        *("max_matching_ngram_size", "prompt_lookup_num_tokens", "target_lookbehind"),
    }
)
# Values at which a field that is not supported does nothing.
_INACTIVE = {
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "low_memory": (False,),
    "min_length": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
}


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """A model's own settings, each None if the file does not say it.

    They are what :func:`jaxalope.generate` uses where its caller says nothing.

    Attributes:
        do_sample: draw from the distribution, or take the likeliest token.
        temperature, top_k, top_p, min_p, typical_p: as the stages of ``infer.truncation``.
        repetition_penalty, no_repeat_ngram_size: as the stages of ``infer.penalties``.
        max_new_tokens: that a response may get.
        max_length: of prompt and response together.
        min_new_tokens: before which no end-of-sequence is drawn.
        eos_token_id: the token or tokens that end a response.
        pad_token_id: as published; nothing here pads with it.
        stop_strings: a string or strings that end a response.
        suppress_tokens: that are never drawn.
        bad_words_ids: sequences of tokens that are never completed.
        other: all further fields, as they were.
        order: every field of the file, in its order.
    """

    do_sample: bool | None = None
    temperature: int | float | None = None
    top_k: int | None = None
    top_p: int | float | None = None
    min_p: int | float | None = None
    typical_p: int | float | None = None
    repetition_penalty: int | float | None = None
    no_repeat_ngram_size: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    stop_strings: str | tuple[str, ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    order: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GenerationDefaults:
        """From the file's contents.

        Warns of fields that would change what is drawn, and are not supported here, by name.

        Raises:
            InputError: a field has a value of the wrong kind; names it.
        """
        known = {name: _checked(name, values[name]) for name in _KINDS if name in values}
        other = {name: value for name, value in values.items() if name not in _KINDS}
        _warn_of(other)
        return cls(**known, other=other, order=tuple(values))

    def to_json(self) -> dict[str, Any]:
        """The file's contents: every field as it was, in its order; changed or new ones as now."""
        own = {name: _listed(getattr(self, name)) for name in _KINDS}
        said = [name for name, value in own.items() if value is not None]
        names = dict.fromkeys((*self.order, *said, *self.other))
        # A field that is null in the file stays so.
        return {name: self.other[name] if name in self.other else own[name] for name in names}

    @property
    def stop_tokens(self) -> tuple[int, ...] | None:
        """The ids that end a response; None if the file does not say."""
        ids = self.eos_token_id
        return (ids,) if isinstance(ids, int) else ids

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a response."""
        return (
            (self.stop_strings,) if isinstance(self.stop_strings, str) else self.stop_strings or ()
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(of: Any) -> Any:
    return lambda value: isinstance(value, list | tuple) and all(map(of, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_IDS = _is_list(_is_int)
# What each field that we read may be, beside null: a test, and words.
_KINDS = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty"),
        (_is_number, "a number"),
    ),
    **dict.fromkeys(
        ("top_k", "no_repeat_ngram_size", "max_new_tokens", "max_length", "min_new_tokens",
         "pad_token_id"),
        (_is_int, "a whole number"),
    ),
    "eos_token_id": (lambda value: _is_int(value) or _IDS(value), "an id or a list of ids"),
    "stop_strings": (lambda value: _is_text(value) or _is_list(_is_text)(value),
                     "a string or a list of strings"),
    "suppress_tokens": (_IDS, "a list of ids"),
    "bad_words_ids": (_is_list(_IDS), "a list of lists of ids"),
}  # fmt: skip


def _checked(name: str, value: Any) -> Any:
    fits, kind = _KINDS[name]
    if value is not None and not fits(value):
        raise InputError(f"generation_config.json: {name}={value!r} must be {kind}, or null")
    return _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    return list(map(_listed, value)) if isinstance(value, tuple) else value


def _warn_of(other: Mapping[str, Any]) -> None:
    active = [
        f"{name}={value!r}"
        for name, value in other.items()
        if name not in _NO_BEARING
        and value not in (None, [], {})
        and value not in _INACTIVE.get(name, ())
    ]
    if active:
        warnings.warn(
            f"generation_config.json asks for what is not supported here, and is left aside: "
            f"{', '.join(active)}",
            stacklevel=3,
        )
