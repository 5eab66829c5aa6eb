"""A published ``config.json``: which of its fields matter, and which may be passed over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from ...errors import InputError
from ..fields import describe, field_types, from_json

# Fields of any configuration that change no computation of a trained model.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention
    architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length max_position_embeddings min_length
    model_max_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states
    output_router_logits output_scores prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache
    """.split()  # noqa: SIM905 (a list of one name a line would fill the page)
)


_IDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})


def read_object(path: epath.Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: it is no JSON, or another value; names the file.
    """
    try:
        contents = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}); fetch it again") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds {contents!r:.40} and no JSON object; fetch it again")
    return contents


def types_of(config: type, names: Mapping[str, str]) -> dict[str, Any]:
    """The types of published fields: those of the fields of ours that they become.

    Args:
        config: our dataclass.
        names: of its fields, by the published ones.
    """
    ours = field_types(config)
    return {theirs: ours[name] for theirs, name in names.items()}


def with_single_ids(published: Mapping[str, Any]) -> dict[str, Any]:
    """``published`` with the first of several ids; generation defaults have them all."""
    return {
        name: next(iter(value), None) if name in _IDS and isinstance(value, list) else value
        for name, value in published.items()
    }


def check_types(
    published: Mapping[str, Any], types: Mapping[str, Any], where: Any = "config.json"
) -> None:
    """Raise InputError for a field of ``published`` that is not of its type; names it."""
    for name, wanted in types.items():
        if name not in published:
            continue
        try:
            from_json(published[name], wanted, name)
        except InputError:
            raise InputError(
                f"{where}: {name}={published[name]!r} must be {describe(wanted)}"
            ) from None


def object_of(published: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field that is an object; an empty one where it is absent or null.

    Raises:
        InputError: it is none.
    """
    value = published.get(name) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"config.json: {name}={value!r} must be an object")
    return value


def check_fields(
    published: Mapping[str, Any],
    *,
    types: Mapping[str, Any],
    required: Collection[str],
    known: Collection[str],
    fixed: Mapping[str, Collection[Any]],
) -> None:
    """Hold a ``config.json`` against what is implemented.

    Args:
        published: its contents.
        types: of the fields that are read; see :func:`types_of`.
        required: fields without which there is no model.
        known: fields that the family reads, the required ones or not.
        fixed: the values of fields that are implemented for these alone; a field that is absent is
            one of them.

    Raises:
        InputError: a required field is absent, or one has a value of another type or one that means
            another computation.
    """
    absent = [name for name in required if name not in published]
    if absent:
        raise InputError(
            f"config.json has no {', '.join(absent)}; it is incomplete, or of another family"
        )
    check_types(published, types)
    for name, values in fixed.items():
        if name in published and published[name] not in values:
            only = " or ".join(map(repr, values))
            raise InputError(
                f"config.json: {name}={published[name]!r} is another computation, which is not "
                f"implemented; only {only} is"
            )
    strange = sorted(published.keys() - set(known) - set(required) - fixed.keys() - _HARMLESS)
    if strange:
        warnings.warn(
            f"config.json: {', '.join(strange)} {'is' if len(strange) == 1 else 'are'} unknown "
            "here and ignored",
            stacklevel=4,
        )


def rope_theta(published: Mapping[str, Any], default: float) -> float:
    """The base of rotary positions, wherever this version of the format keeps it.

    Raises:
        InputError: positions are scaled, which is not implemented, or the base is no number.
    """
    rope = object_of(published, "rope_parameters") or object_of(published, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"config.json: rope_type={kind!r} is not implemented; only 'default' is")
    for place, name in (
        (rope, "rope_theta"),
        (published, "rope_theta"),
        (published, "rotary_emb_base"),
    ):
        if name in place:
            check_types(place, {name: float})
            return float(place[name])
    return default


def compute_dtype(published: Mapping[str, Any]) -> str:
    """The dtype to compute in: bfloat16 for models that were published in 16 bits."""
    name = str(published.get("dtype") or published.get("torch_dtype") or "float32")
    return "bfloat16" if name.removeprefix("torch.") in ("bfloat16", "float16") else "float32"
