"""`generation_config.json`: read, and written back as it was."""

import dataclasses
import json
import warnings

import pytest

from jaxalope.errors import InputError
from jaxalope.model.generation_defaults import GenerationDefaults

# As publishers write them: numbers of either kind, nulls, lists, fields of nobody else.
FILES = [
    "{}",
    '{"eos_token_id": 163586, "max_length": 131072}',
    '{"_from_model_config": true, "bos_token_id": 2, "cache_implementation": "hybrid", '
    '"eos_token_id": [1, 107], "pad_token_id": 0, "transformers_version": "4.42.0.dev0"}',
    '{"do_sample": true, "temperature": 1, "top_p": 0.95, "top_k": null, "repetition_penalty": '
    '1.0, "bad_words_ids": [[3], [4, 5]], "stop_strings": "END", "num_beams": 1, "top_h": null}',
]


@pytest.mark.parametrize("text", FILES)
def test_the_file_comes_back_as_it_was(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defaults = GenerationDefaults.from_json(json.loads(text))
    assert json.dumps(defaults.to_json()) == json.dumps(json.loads(text))


def test_fields_are_read():
    defaults = GenerationDefaults.from_json(json.loads(FILES[3]))
    assert (defaults.do_sample, defaults.temperature, defaults.top_k) == (True, 1, None)
    assert defaults.bad_words_ids == ((3,), (4, 5)) and defaults.stops == ("END",)
    assert defaults.stop_tokens is None and defaults.other == {"num_beams": 1, "top_h": None}
    assert GenerationDefaults.from_json(json.loads(FILES[1])).stop_tokens == (163586,)
    assert GenerationDefaults.from_json(json.loads(FILES[2])).stop_tokens == (1, 107)


def test_a_changed_field_is_written_in_its_place():
    defaults = GenerationDefaults.from_json(json.loads(FILES[3]))
    changed = dataclasses.replace(defaults, top_p=0.5, eos_token_id=(7,), do_sample=None).to_json()
    assert list(changed) == [*json.loads(FILES[3]), "eos_token_id"]
    assert (changed["top_p"], changed["eos_token_id"], changed["do_sample"]) == (0.5, [7], None)
    assert GenerationDefaults(top_k=3).to_json() == {"top_k": 3}


def test_what_would_change_the_draws_and_is_not_here_is_named():
    values = {"num_beams": 4, "penalty_alpha": 0.6, "temperature": 0.5, "eta_cutoff": 0.0}
    with pytest.warns(UserWarning) as caught:
        defaults = GenerationDefaults.from_json(values)
    (warning,) = caught
    said = str(warning.message)
    assert "num_beams=4, penalty_alpha=0.6" in said
    assert "temperature" not in said and "eta_cutoff" not in said
    assert defaults.to_json() == values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", 1.5),
        ("eos_token_id", [1, "2"]),
        ("do_sample", 1),
        ("bad_words_ids", [1]),
    ],
)
def test_a_value_of_another_kind_is_named(name, value):
    with pytest.raises(InputError, match=f"{name}="):
        GenerationDefaults.from_json({name: value})
