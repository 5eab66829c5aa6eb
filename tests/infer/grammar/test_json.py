"""JSON and JSON Schema: whatever is drawn parses and satisfies, whatever is cut is a beginning."""

import json

import jsonschema
import numpy as np
import pytest

from jaxalope.errors import InputError
from jaxalope.infer.grammar import Json, JsonSchema
from jaxalope.infer.grammar.automaton import ByteAutomaton
from jaxalope.infer.grammar.json_schema import json_schema


def record(properties, required=(), **more):
    return {"type": "object", "properties": properties, "required": list(required), **more}


PERSON = {
    "$defs": {
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer"},
        "tags": {
            "type": "array",
            "items": {"enum": ["é", "b", 1, None]},
            "minItems": 1,
            "maxItems": 3,
        },
        "home": {"$ref": "#/$defs/address"},
        "score": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
SUBTREES = {"type": "array", "items": {"$ref": "#/$defs/node"}}
NODE = record({"v": {"type": ["integer", "boolean"]}, "sub": SUBTREES}, ["v"])
TREE = {"$defs": {"node": {**NODE, "additionalProperties": False}}, "$ref": "#/$defs/node"}
OPEN = {
    "type": "object",
    "properties": {"a": {"const": 1}, "ab": {"type": "null"}},
    "required": ["z"],
    "additionalProperties": {"type": "integer"},
}
SHAPES = {
    "oneOf": [
        record({"kind": {"const": "circle"}, "r": {"type": "number"}}, ["kind", "r"]),
        record({"kind": {"const": "text"}, "s": {"type": "string"}}, ["kind"]),
        {"type": ["string", "null"], "maxLength": 2},
        {"enum": [True, [1, {"x": "y"}]]},
    ]
}
TUPLE = {
    "type": "array",
    "prefixItems": [{"type": "string"}, {"type": "integer"}],
    "items": {"type": "boolean"},
    "minItems": 1,
    "maxItems": 4,
}
UNTYPED = {
    "minLength": 2,
    "maxItems": 1,
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
}
LOOSE = {"type": "string", "pattern": "b|^é", "minLength": 2, "maxLength": 5}
SCHEMAS = {
    "person": PERSON,
    "tree": TREE,
    "open": OPEN,
    "shapes": SHAPES,
    "tuple": TUPLE,
    "untyped": UNTYPED,
    "loose": LOOSE,
}


def draw(spec, vocabulary, tools, count, most, seed=0):
    """Texts of a uniform walk over allowed tokens; checks that cut ones are beginnings."""
    grammar, rng = spec.compile(vocabulary, backend="python"), np.random.default_rng(seed)
    fresh, ended = ByteAutomaton(grammar.automaton.start), []
    for _ in range(count):
        ids, done = tools.walk(grammar, vocabulary, rng, most)
        text = tools.text_of(ids, vocabulary)
        if done:
            ended.append(text)
        else:
            assert fresh.advance(fresh.start, text) is not None
    return ended


@pytest.mark.parametrize("whitespace", [0, 15])
def test_300_walks_of_any_json(whitespace, vocabulary, tools):
    texts = draw(Json(whitespace), vocabulary, tools, count=300, most=50)
    values = [json.loads(text) for text in texts]  # Strict: UTF-8, escapes, numbers, nesting.
    assert 100 < len(texts) < 300
    assert {type(v) for v in values} == {dict, list, str, int, float, bool, type(None)}
    for value in map(repr, values):
        value.encode()  # No half of a surrogate pair came out of the escapes.


@pytest.mark.parametrize("name", SCHEMAS)
def test_300_walks_of_a_schema_satisfy_it(name, vocabulary, tools):
    schema = SCHEMAS[name]
    validator = jsonschema.Draft202012Validator(schema)
    texts = draw(JsonSchema(schema, whitespace=3), vocabulary, tools, count=300, most=120)
    assert len(texts) > 30, "too few walks ended for this test to say something"
    for text in texts:
        assert validator.is_valid(json.loads(text)), text
    assert len(set(texts)) > 10


def accepts(schema, text, whitespace=15):
    automaton = ByteAutomaton(json_schema(schema, whitespace))
    state = automaton.advance(automaton.start, text if isinstance(text, bytes) else text.encode())
    return state is not None and state.nullable


VALUES = [
    *(0, -1, 12, 1.5, -0.0, 1e30, True, False, None, "", "a", "éé", "bab", 'q"\\\n\x01\x7f', "🦌"),
    *(
        [],
        [1],
        ["a"],
        [[]],
        ["a", 3, True],
        ["a", "b"],
        [1, {"x": "y"}],
        {},
        {"a": True},
        {"a": 1},
        {"z": 3},
    ),
    *({"a": 1, "z": 3}, {"ab": None, "z": 1, "q": 2}, {"z": 1, "abc": 3}, {"z": 1, "q": "no"}),
    *({"name": "ab", "tags": ["é"]}, {"name": "abcde", "tags": ["é"]}, {"name": "a", "tags": []}),
    *({"name": "a", "age": 3, "tags": [None, 1], "home": {"zip": "01234"}, "score": None}),
    {"name": "a", "tags": [1], "home": {"street": "s", "zip": "0123"}},
    {"name": "🦌🦌🦌🦌", "tags": ["b"], "score": -1.5e-7},
    *({"v": 1}, {"v": True, "sub": [{"v": 2, "sub": []}, {"v": 3}]}, {"v": 1, "sub": [{"v": "x"}]}),
    *({"kind": "circle", "r": 1}, {"kind": "text", "r": 1}, {"kind": "circle"}, {"kind": "other"}),
    {"a": {"b": [{"c": [1, "2", None, {"d": {}}]}]}},
]


@pytest.mark.parametrize("name", [*SCHEMAS, "anything"])
def test_documents_are_taken_exactly_when_they_satisfy_the_schema(name):
    schema = SCHEMAS.get(name, True)
    validator = jsonschema.Draft202012Validator(schema)
    count = {True: 0, False: 0}
    for value in VALUES:
        valid = validator.is_valid(value)
        count[valid] += 1
        for text in (
            json.dumps(value, ensure_ascii=False),
            json.dumps(value, ensure_ascii=False, indent=2),
        ):
            assert accepts(schema, text) == valid, (value, text)
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        assert accepts(schema, compact, whitespace=0) == valid
    assert count[True] >= 2 and (count[False] > 2 or schema is True)


A = {"$ref": "#/$defs/a"}
GOOD = [
    *(
        '"\\u00e9"',
        '"\\ud83e\\uDD8C"',
        '"\\/"',
        "-0",
        "0.50",
        "1E+05",
        "1e-0",
        "[1]",
        "[ 1 , 2 ]",
    ),
    *('"\\uFFFF\\ue000\\ud7ff"', '{"\\u0061":1,"\\n":2}', "[" * 200 + "]" * 200),
]
BAD = [
    *(
        '"\\ud83e"',
        '"\\udd8c"',
        '"\\ud83e\\u0041"',
        '"\\x41"',
        '"\n"',
        '"a',
        "01",
        "+1",
        ".5",
        "1.",
    ),
    *("1e", "-", "1 2", "[1,]", "[,1]", "{,}", '{"a":1,}', '{"a"}', "{a:1}", "'a'", "nul", "True"),
    *("[1}", "", " 1", "1 ", "[" + " " * 16 + "]", b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"'),
]


@pytest.mark.parametrize("text", GOOD)
def test_json_is_taken(text):
    json.loads(text)
    assert accepts(True, text)


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_json_or_too_much_space_is_not(text):
    assert not accepts(True, text)


def test_length_counts_characters_not_bytes_and_not_escapes():
    schema = {"type": "string", "minLength": 2, "maxLength": 2}
    for two in ('"ab"', '"🦌é"', '"\\n\\u0041"', '"\\ud83e\\udd8ca"'):
        assert len(json.loads(two)) == 2 and accepts(schema, two)
    for other in ('"a"', '"🦌"', '"abc"', '"\\ud83e\\udd8c"'):
        assert not accepts(schema, other)


def test_a_key_of_another_property_cannot_be_named():
    # Not even by an escape: the value of "a" would then be checked against the wrong schema.
    schema = record({"a": {"type": "null"}}, additionalProperties={"type": "integer"})
    assert accepts(schema, '{"a":null,"b":1,"aa":2,"":3}')
    assert not accepts(schema, '{"a":1}') and not accepts(schema, '{"\\u0061":1}')
    assert not accepts(schema, '{"b":1,"a":null}')  # The order is that of `properties`.


def test_a_schema_that_only_ends_in_itself_loses_the_branch_that_never_ends():
    loop = {"$ref": "#/$defs/loop"}
    endless = record({"next": loop}, ["next"])
    schema = {"$defs": {"loop": endless}, "anyOf": [loop, {"type": "array", "items": loop}]}
    assert accepts(schema, "[]")
    automaton = ByteAutomaton(json_schema(schema, 15))
    assert automaton.advance(automaton.start, b"{") is None
    assert automaton.advance(automaton.start, b"[{") is None


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "number", "minimum": 3}, r"#/minimum: the keyword 'minimum' is not supported"),
        ({"type": "array", "items": {"uniqueItems": True}}, r"#/items/uniqueItems"),
        ({"type": "object", "properties": {"a/b": {"format": "date"}}}, r"#/properties/a/b/format"),
        ({"$defs": {"x": {"not": {}}}, "$ref": "#/$defs/x"}, r"#/\$defs/x/not"),
        ({"type": "text"}, r"#/type: 'text' is no type"),
        ({"type": ["string", 3]}, r"#/type: 3 is no type"),
        ({"anyOf": [{}], "type": "string"}, r"#/type: not supported beside 'anyOf'"),
        ({"$ref": "#/$defs/x"}, r"'#/\$defs/x' leads nowhere, at '\$defs'"),
        ({"$ref": "https://example.org/s"}, r"\$ref: 'https://example.org/s' is not supported"),
        ({"$ref": "#anchor"}, r"'#anchor' \(an anchor\)"),
        ({"$ref": "#"}, r"leads back to itself"),
        (
            {"$defs": {"a": {"anyOf": [A, {}]}, "b": A}, "anyOf": [A, {"$ref": "#/$defs/b"}]},
            "leads back to itself",
        ),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, r"#/allOf: several"),
        ({"anyOf": []}, r"#/anyOf: the list is empty"),
        ({"oneOf": [{"type": "number"}, {"type": ["integer", "null"]}]}, "0 and 1 may both hold"),
        ({"oneOf": [{}, {"enum": [1, "a"]}, {"const": 1.0}]}, "0 and 1 may both hold"),
        ({"oneOf": [{"enum": [1, "a"]}, {"const": 1.0}]}, "0 and 1 may both hold"),
        ({"type": "string", "pattern": "(?=a)"}, r"#/pattern: pattern .*look-ahead"),
        ({"minLength": -1}, r"#/minLength: -1"),
        ({"maxItems": True}, r"#/maxItems: True"),
        ({"required": "a"}, r"#/required: 'a' is no list"),
        ({"required": [1]}, r"#/required: 1 is no property name"),
        ({"properties": []}, r"#/properties: \[\] is no dict"),
        ({"enum": 3}, r"#/enum: 3 is no list"),
        ({"const": "\ud800"}, r"#/const: a value has no JSON text"),
        ({"items": 3}, r"#/items: a schema is an object or a boolean, not 3"),
        ([], "a schema is an object or a boolean"),
    ],
    ids=str,
)
def test_what_is_unsupported_or_wrong_is_named_by_its_path(schema, named, vocabulary):
    with pytest.raises(InputError, match=named):
        JsonSchema(schema).compile(vocabulary, backend="python")


@pytest.mark.parametrize(
    "schemas",
    [
        [{"type": "string"}, {"type": ["integer", "null"]}, {"type": "object"}],
        [{"const": 1}, {"enum": ["1", True, 2.5]}, {"type": "array"}],
        [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        [False, {"type": "string"}],
    ],
)
def test_one_of_is_any_of_where_no_two_can_hold(schemas):
    tagged = [
        {"type": "object", "properties": {"t": {"const": t}}, "required": ["t"]} for t in "ab"
    ]
    schema = {"$defs": {"a": tagged[0], "b": tagged[1]}, "oneOf": schemas}
    validator = jsonschema.Draft202012Validator(schema)
    for value in [*VALUES, {"t": "a"}, {"t": "b", "x": 1}, 2.5, "1"]:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        # Whole numbers with a fraction are integers to the schema, but not written here.
        if type(value) is not float:
            assert accepts(schema, text, 0) == validator.is_valid(value)


def test_specs_are_values():
    assert JsonSchema({"type": "null"}) == JsonSchema('{"type": "null"}')
    assert hash(JsonSchema(True)) == hash(JsonSchema(True)) and Json() == Json(15)
    with pytest.raises(InputError, match="schema is not JSON"):
        JsonSchema("{")
    with pytest.raises(InputError, match="schema is not JSON"):
        JsonSchema({"const": float("nan")})
    for spec in (Json, lambda whitespace: JsonSchema(True, whitespace)):
        with pytest.raises(InputError, match="whitespace=-1"):
            spec(whitespace=-1)


def test_many_properties():
    names = [f"property_{i}" for i in range(300)]
    schema = {
        "type": "object",
        "properties": {n: {"type": "integer"} for n in names},
        "required": names[::7],
    }
    chosen = [n for i, n in enumerate(names) if i % 7 == 0 or i % 5 == 0]
    assert accepts(schema, json.dumps({n: 1 for n in chosen}))
    assert not accepts(schema, json.dumps({n: 1 for n in chosen if n != "property_294"}))
