"""Published `config.json`s that are damaged: every field that is read is held against its type."""

import json
import warnings

import jax
import numpy as np
import pytest

import jaxalope
from jaxalope import InputError, Model
from jaxalope.model import FAMILIES, GPTNeoXConfig, build_model
from jaxalope.sharding import abstract

PUBLISHED = {name: f for name, f in FAMILIES.items() if f.published is not None}


@pytest.mark.parametrize("family", PUBLISHED)
def test_no_value_of_another_type_gets_past_the_configuration(family):
    """Whatever stands in a field: a configuration, or an error that names the field."""
    published = PUBLISHED[family].published
    contents = published.config_to(PUBLISHED[family].config.tiny())
    refused = set()
    for name in contents.keys() - {"model_type", "architectures"}:
        for wrong in ("x", 2.5, [], ["x"], {}, {"a": 1}, None, True):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    published.config(contents | {name: wrong}, dict)
            except InputError as error:
                assert name.removesuffix("_config") in str(error), (name, wrong)
                refused.add((name, str(wrong)))
    numbers = {name for name, value in contents.items() if type(value) is int}
    unread = {"max_position_embeddings", "max_sequence_length", "num_key_value_heads"}
    assert {(name, "x") for name in numbers - unread} <= refused


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = GPTNeoXConfig.tiny()
    graphdef, shapes, _ = abstract(lambda key: build_model(config, key))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    path = tmp_path_factory.mktemp("published") / "neox"
    jaxalope.save(Model(config, graphdef, params), path)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' must be int"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 must be int"),
        ({"hidden_size": None}, "hidden_size=None must be int"),
        ({"rotary_pct": None}, "rotary_pct=None must be float"),
        ({"rotary_emb_base": None}, "rotary_emb_base=None must be float"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be float"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object"),
        (
            {"rope_parameters": {"partial_rotary_factor": "all"}},
            "rope_parameters: partial_rotary_factor='all' must be float",
        ),
        ({"architectures": 3}, "architectures=3 must be"),
    ],
)
def test_a_field_of_another_type_is_named(changes, words, directory):
    file = directory / "config.json"
    contents = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(contents) | changes))
        with pytest.raises(InputError, match=rf"config.json: {words}"):
            jaxalope.load(directory)
    finally:
        file.write_text(contents)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "[1]", "3", "null", "{"])
def test_a_file_that_holds_no_object_is_named(name, text, directory):
    file = directory / name
    contents = file.read_text() if file.exists() else "{}"
    try:
        file.write_text(text)
        with pytest.raises(InputError, match=rf"/{name} (holds .* and no JSON object|is no JSON)"):
            jaxalope.load(directory)
    finally:
        file.write_text(contents)


def test_several_ids_that_end_a_text_are_no_damage(directory):
    file = directory / "config.json"
    contents = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(contents) | {"eos_token_id": [0, 1]}))
        jaxalope.load(directory)
    finally:
        file.write_text(contents)
