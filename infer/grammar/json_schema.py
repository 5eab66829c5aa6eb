"""JSON Schema (a part of draft 2020-12) as an expression over the bytes of JSON documents.

Every document of the expression satisfies the schema; of the documents that satisfy it, these are
in the expression:

* properties in the order of `properties`, then those that only `required` names, then others;
* white space as in `json_text.space`, none before or after the document;
* strings under `pattern`, constants, and keys beside named properties in their plain spelling
  (`json_text.plain_character`); integers without fraction or exponent where `type` is `integer`.

A key that additional properties may have can come twice. Assertions that are not here are refused
by name: silently not enforcing one would be the worse answer.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

from ...errors import InputError
from .characters import ALL
from .derivatives import Derivatives
from .expression import (
    NOTHING,
    Choice,
    Expression,
    Repeat,
    Rule,
    Sequence,
    both,
    choice,
    difference,
    repeat,
)
from .json_text import (
    BOOLEAN,
    INTEGER,
    NULL,
    NUMBER,
    any_character,
    array,
    constant,
    object_,
    pair,
    plain_character,
    quoted,
    space,
    string,
)
from .regex import search

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ANNOTATIONS = {
    "$comment",
    "$defs",
    "$schema",
    "default",
    "definitions",
    "deprecated",
    "description",
    "discriminator",
    "example",
    "examples",
    "readOnly",
    "title",
    "writeOnly",
}
_SHAPES = {
    "additionalProperties",
    "items",
    "maxItems",
    "maxLength",
    "minItems",
    "minLength",
    "pattern",
    "prefixItems",
    "properties",
    "required",
}
# Each of these stands alone, beside annotations (`enum` and `const` also beside `type`).
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")


def json_schema(schema: Any, whitespace: int) -> Expression:
    """The documents of a schema.

    Args:
      schema: a parsed schema: a dict or a bool.
      whitespace: most characters of white space in each place that may have some.

    Raises:
      InputError: what is not supported, or is no schema, by its path and keyword.
    """
    compiler = _Compiler(schema, whitespace)
    whole = compiler.value(schema, "#")
    barren = compiler.barren_rules()
    if barren:  # Their documents would have no end: as if they were `false`.
        compiler = _Compiler(schema, whitespace, barren)
        whole = compiler.value(schema, "#")
    return whole


class _Compiler:
    """One pass over a schema; a `$ref` becomes a rule, named by its pointer."""

    def __init__(self, root: Any, whitespace: int, barren: frozenset[str] = frozenset()):
        self._root, self._space, self._barren = root, space(whitespace), barren
        self._rules: dict[str, Rule] = {}
        self._text = quoted(repeat(any_character()))
        self._any: Rule | None = None

    def value(self, schema: Any, path: str) -> Expression:
        """The documents of the schema at `path`."""
        if schema is True or schema == {}:
            return self._anything()
        if schema is False:
            return NOTHING
        self._check(schema, path)
        match _whole(schema):
            case "$ref":
                return self._reference(schema["$ref"], path)
            case "anyOf" | "oneOf" | "allOf" as keyword:
                return self._combined(keyword, schema[keyword], path)
            case "enum" | "const" as keyword:
                return choice(*self._constants(schema, keyword, path))
        return choice(*(self._typed(kind, schema, path) for kind in _types(schema)))

    def _check(self, schema: Any, path: str) -> None:
        if not isinstance(schema, dict):
            raise InputError(f"schema {path}: a schema is an object or a boolean, not {schema!r}")
        whole = _whole(schema)
        for keyword in schema:
            if keyword in _ANNOTATIONS or (keyword == "$id" and path == "#"):
                continue
            if keyword != "type" and keyword not in _SHAPES and keyword not in _WHOLE:
                raise InputError(
                    f"schema {path}/{keyword}: the keyword {keyword!r} is not supported by the "
                    "Python backend; leave it out, or use backend='llguidance'"
                )
            alone = whole is None or keyword == whole
            if not alone and not (keyword == "type" and whole in ("enum", "const")):
                raise InputError(
                    f"schema {path}/{keyword}: not supported beside {whole!r} by the Python "
                    f"backend; merge the two by hand, or use backend='llguidance'"
                )
        for kind in _types(schema):
            if kind not in _TYPES:
                raise InputError(
                    f"schema {path}/type: {kind!r} is no type; use one of {', '.join(_TYPES)}"
                )
        for name, kind in (("properties", dict), ("required", list), ("pattern", str)):
            if not isinstance(schema.get(name, kind()), kind):
                raise InputError(f"schema {path}/{name}: {schema[name]!r} is no {kind.__name__}")
        for name in ("prefixItems", "anyOf", "oneOf", "allOf", "enum"):
            if not isinstance(schema.get(name, []), list):
                raise InputError(f"schema {path}/{name}: {schema[name]!r} is no list")
        for name in ("minLength", "maxLength", "minItems", "maxItems"):
            bound = schema.get(name, 0)
            if type(bound) is not int or bound < 0:
                raise InputError(f"schema {path}/{name}: {bound!r} must be an integer from 0 on")

    def _anything(self) -> Expression:
        if self._any is None:
            self._any = Rule("any value")
            self._any.define(choice(*(self._typed(kind, {}, "#") for kind in _types({}))))
        return self._any

    def _reference(self, pointer: Any, path: str) -> Expression:
        target = self._resolve(pointer, path)
        if pointer in self._barren:
            return NOTHING
        if pointer not in self._rules:
            rule = self._rules[pointer] = Rule(pointer)
            rule.define(self.value(target, pointer))
            _check_progress(rule, pointer)
        return self._rules[pointer]

    def _resolve(self, pointer: Any, path: str) -> Any:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise InputError(
                f"schema {path}/$ref: {pointer!r} is not supported; refer to a part of the same "
                "schema, as in '#/$defs/name'"
            )
        target = self._root
        for part in unquote(pointer).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            elif isinstance(target, dict) and name in target:
                target = target[name]
            else:
                raise InputError(f"schema {path}/$ref: {pointer!r} leads nowhere, at {part!r}")
        if target is self._root and pointer not in ("#", "#/"):
            raise InputError(
                f"schema {path}/$ref: {pointer!r} (an anchor) is not supported; use a path, as in "
                "'#/$defs/name'"
            )
        return target

    def _combined(self, keyword: str, schemas: list, path: str) -> Expression:
        if not schemas:
            raise InputError(f"schema {path}/{keyword}: the list is empty; give it a schema")
        parts = [self.value(s, f"{path}/{keyword}/{i}") for i, s in enumerate(schemas)]
        if keyword == "allOf" and len(schemas) > 1:
            raise InputError(
                f"schema {path}/allOf: several schemas in allOf are not supported by the Python "
                "backend; merge them by hand, or use backend='llguidance'"
            )
        if keyword == "oneOf":
            for i, left in enumerate(schemas):
                for j, right in enumerate(schemas[:i]):
                    if not self._disjoint(left, right, path):
                        raise InputError(
                            f"schema {path}/oneOf: entries {j} and {i} may both hold for one "
                            "value; use anyOf, or tell them apart by type or by a required "
                            "property with another constant in each"
                        )
        return choice(*parts)

    def _constants(self, schema: dict, keyword: str, path: str) -> list[Expression]:
        values = [schema["const"]] if keyword == "const" else schema["enum"]
        try:
            return [
                constant(value, self._space)
                for value in values
                if any(_is_of_type(value, kind) for kind in _types(schema))
            ]
        except ValueError as e:
            raise InputError(f"schema {path}/{keyword}: a value has no JSON text: {e}") from e

    def _typed(self, kind: str, schema: dict, path: str) -> Expression:
        match kind:
            case "object":
                return self._object(schema, path)
            case "array":
                return self._array(schema, path)
            case "string":
                return self._string(schema, path)
        return {"number": NUMBER, "integer": INTEGER, "boolean": BOOLEAN, "null": NULL}[kind]

    def _string(self, schema: dict, path: str) -> Expression:
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if "pattern" not in schema:
            return quoted(repeat(any_character(), low, high))
        try:
            content = search(schema["pattern"], plain_character)
        except InputError as e:
            raise InputError(f"schema {path}/pattern: {e}") from e
        if low or high is not None:
            content = both(content, repeat(plain_character(ALL), low, high))
        return quoted(content)

    def _array(self, schema: dict, path: str) -> Expression:
        prefix = [
            self.value(s, f"{path}/prefixItems/{i}")
            for i, s in enumerate(schema.get("prefixItems", []))
        ]
        item = self.value(schema.get("items", True), f"{path}/items")
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        return array(prefix, item, low, high, self._space)

    def _object(self, schema: dict, path: str) -> Expression:
        named, required = schema.get("properties", {}), schema.get("required", [])
        for name in required:
            if not isinstance(name, str):
                raise InputError(f"schema {path}/required: {name!r} is no property name")
        others = schema.get("additionalProperties", True)
        other = self.value(others, f"{path}/additionalProperties")
        values = {n: self.value(s, f"{path}/properties/{n}") for n, s in named.items()}
        values |= {name: other for name in required if name not in named}
        try:
            keys = {name: string(name) for name in values}
        except ValueError as e:
            raise InputError(f"schema {path}/properties: a name has no JSON text: {e}") from e
        pairs = [
            (pair(keys[name], value, self._space), name in required)
            for name, value in values.items()
        ]
        key = self._text
        if keys:
            key = difference(quoted(repeat(plain_character(ALL))), choice(*keys.values()))
        return object_(pairs, pair(key, other, self._space), self._space)

    def _disjoint(self, left: Any, right: Any, path: str, depth: int = 0) -> bool:
        """Whether it is plain that no value satisfies both; by type, constant or required key."""
        if left is False or right is False:
            return True
        left, right = self._followed(left, path), self._followed(right, path)
        if not isinstance(left, dict) or not isinstance(right, dict) or depth > 8:
            return False
        if {_whole(left), _whole(right)} & {"anyOf", "oneOf", "allOf"}:
            return False
        ours, theirs = _values(left), _values(right)
        if ours is not None and theirs is not None:
            return not {_identity(v) for v in ours} & {_identity(v) for v in theirs}
        if ours is None and theirs is not None:
            left, right, ours = right, left, theirs
        if ours is not None:
            return not any(_is_of_type(v, kind) for v in ours for kind in _types(right))
        kinds, others = (
            set(_types(s)) | ({"integer"} if "number" in _types(s) else set())
            for s in (left, right)
        )
        if kinds & others != {"object"}:
            return not kinds & others
        in_both = set(left.get("required", [])) & set(right.get("required", []))
        ours, theirs = left.get("properties", {}), right.get("properties", {})
        return any(
            name in ours
            and name in theirs
            and self._disjoint(ours[name], theirs[name], path, depth + 1)
            for name in in_both
        )

    def _followed(self, schema: Any, path: str) -> Any:
        seen = set()
        while isinstance(schema, dict) and "$ref" in schema and schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            schema = self._resolve(schema["$ref"], path)
        return schema

    def barren_rules(self) -> frozenset[str]:
        """Names of the rules without a finite document."""
        rules = [*self._rules.values(), *filter(None, [self._any])]
        nodes = _reachable(rules)
        derivatives, fertile = Derivatives(), set()

        def has_text(node: Expression) -> bool:
            match node:
                case Sequence(head=head, tail=tail):
                    return head in fertile and tail in fertile
                case Choice(branches=branches):
                    return not fertile.isdisjoint(branches)
                case Repeat(body=body):
                    return node.nullable or body in fertile
                case Rule(body=body):
                    return body in fertile
            return derivatives.alive(node)

        # The least fixed point; parts come after the whole, so that few rounds do.
        while grown := [n for n in reversed(nodes) if n not in fertile and has_text(n)]:
            fertile.update(grown)
        return frozenset(rule.name for rule in rules if rule not in fertile)


def _parts(node: Expression) -> tuple[Expression, ...]:
    match node:
        case Rule(body=body) | Repeat(body=body):
            return (body,)
        case Sequence(head=head, tail=tail):
            return (head, tail)
        case Choice(branches=branches):
            return branches
    return ()


def _reachable(roots: list[Expression]) -> list[Expression]:
    found, pending = dict.fromkeys(roots), list(roots)
    while pending:
        for part in _parts(pending.pop()):
            if part not in found:
                found[part] = None
                pending.append(part)
    return list(found)


def _check_progress(rule: Rule, pointer: str) -> None:
    """Refuses a rule that begins with itself: a `$ref` that leads back to itself."""
    seen, pending = set(), [rule.body]
    while pending:
        node = pending.pop()
        if node is rule:
            raise InputError(
                f"schema {pointer}: this $ref leads back to itself without an object or array "
                "between"
            )
        if node not in seen:
            seen.add(node)
            starts = isinstance(node, Sequence) and not node.head.nullable
            pending.extend([node.head] if starts else _parts(node))


def _whole(schema: dict) -> str | None:
    return next((keyword for keyword in _WHOLE if keyword in schema), None)


def _types(schema: dict) -> list[str]:
    kinds = schema.get("type", [kind for kind in _TYPES if kind != "integer"])
    return kinds if isinstance(kinds, list) else [kinds]


def _values(schema: dict) -> list | None:
    if _whole(schema) not in ("enum", "const"):
        return None
    values = [schema["const"]] if "const" in schema else schema["enum"]
    return [v for v in values if any(_is_of_type(v, kind) for kind in _types(schema))]


def _is_of_type(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match kind:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return number and (isinstance(value, int) or value.is_integer())
    return number


def _identity(value: Any) -> str:
    """One text for all spellings of an equal value (1 and 1.0; objects in any order)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_identity, value)) + "]"
    if isinstance(value, dict):
        pairs = (json.dumps(key) + ":" + _identity(value[key]) for key in sorted(value))
        return "{" + ",".join(pairs) + "}"
    return json.dumps(value)
