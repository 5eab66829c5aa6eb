"""Values of dataclass fields from JSON and from text, typed by their annotations.

What configurations of models and of runs share: which types an annotation admits, how a value of
each is read, and errors that name the field, the value and the type wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import InputError

# What weights are kept in: integers would cut them off.
FLOATS = ("float32", "bfloat16", "float16")
_NONE_WORDS = ("none", "null")
_BOOL_WORDS = {"true": True, "false": False}


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The resolved annotation of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def required(cls: type) -> list[str]:
    """The fields of a dataclass that have no default."""
    nothing = dataclasses.MISSING
    return [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is nothing and f.default_factory is nothing
    ]


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a single type is its own only one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def kinds(hint: Any) -> dict[str, type]:
    """The dataclasses that an annotation admits, by their ``kind`` (by name if they have none)."""
    return {
        getattr(t, "kind", t.__name__): t for t in alternatives(hint) if dataclasses.is_dataclass(t)
    }


def describe(hint: Any) -> str:
    """An annotation in a user's words: ``int or none``."""
    words = []
    for t in alternatives(hint):
        origin = typing.get_origin(t)
        if t is type(None):
            words.append("none")
        elif t is bool:
            words.append("true or false")
        elif dataclasses.is_dataclass(t):
            words.append(getattr(t, "kind", t.__name__))
        elif origin is tuple:
            args = [describe(a) for a in typing.get_args(t) if a is not ...]
            more = ",..." if typing.get_args(t)[-1] is ... else ""
            words.append(f"({','.join(args)}{more})")
        elif origin is typing.Literal:
            words += [repr(v) for v in typing.get_args(t)]
        else:
            words.append(getattr(t, "__name__", str(t)))
    return " or ".join(words)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` where something is near, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_field(cls: type, name: str, path: str) -> InputError:
    """The error for a field that ``cls`` does not have."""
    known = list(field_types(cls))
    return InputError(
        f"{path}: {cls.__name__} has no field {name!r}{nearest(name, known)} "
        f"(fields: {', '.join(known)})"
    )


def float_dtype(field: str, value: Any) -> str | None:
    """The name of a dtype of weights; None, which leaves them theirs, is None.

    Raises:
        InputError: it is none that weights can be cast to and computed with; ``field`` is named.
    """
    if value is None:
        return None
    try:
        name = np.dtype(value).name
    except (TypeError, ValueError):
        name = None
    if name not in FLOATS:
        choices = ", ".join(FLOATS)
        raise InputError(f"{field}={value!r} is no dtype of weights; use one of {choices}")
    return name


# ------------------------------------------------------------------------------------------- JSON


def to_json(value: Any) -> Any:
    """Dataclasses as dicts (with their ``kind``, if they have one) and tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag = {"kind": value.kind} if hasattr(value, "kind") else {}
        return tag | {name: to_json(getattr(value, name)) for name in field_types(type(value))}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any, hint: Any, path: str) -> Any:
    """The inverse of :func:`to_json` for an annotation.

    Raises:
        InputError: the value does not fit; ``path`` and the type wanted are named.
    """
    options = alternatives(hint)
    if hint is Any or (value is None and type(None) in options):
        return value
    if isinstance(value, dict):
        return _dataclass_from_json(value, hint, path)
    if isinstance(value, list):
        for option in options:
            if typing.get_origin(option) is tuple:
                elements = element_types(option, len(value))
                if elements is not None:
                    return tuple(
                        from_json(v, t, f"{path}.{i}")
                        for i, (v, t) in enumerate(zip(value, elements, strict=True))
                    )
    for option in options:
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        # bool is an int to Python, not to a reader of a config.
        if option in (int, str, bool) and type(value) is option:
            return value
    raise InputError(f"{path}={value!r} cannot be used; {path} wants {describe(hint)}")


def _dataclass_from_json(values: dict[str, Any], hint: Any, path: str) -> Any:
    options = kinds(hint)
    if not options:
        raise InputError(f"{path}={values!r} cannot be used; {path} wants {describe(hint)}")
    values = dict(values)
    tag = values.pop("kind", None) if any(hasattr(t, "kind") for t in options.values()) else None
    if tag is None and len(options) == 1:
        (cls,) = options.values()
    elif tag in options:
        cls = options[tag]
    else:
        raise InputError(f"{path}.kind={tag!r} is not known; use one of {', '.join(options)}")
    known = field_types(cls)
    read = {}
    for name, value in values.items():
        place = f"{path}.{name}" if path else name
        if name not in known:
            raise unknown_field(cls, name, place)
        read[name] = from_json(value, known[name], place)
    missing = [name for name in required(cls) if name not in read]
    if missing:
        raise InputError(f"{path or cls.__name__} lacks {', '.join(missing)}, without a default")
    return cls(**read)


def element_types(hint: Any, length: int) -> tuple[Any, ...] | None:
    """The types of a tuple's elements at this length; None where the length does not fit."""
    args = typing.get_args(hint)
    if args and args[-1] is ...:
        return (args[0],) * length
    return args if len(args) == length else None


# ------------------------------------------------------------------------------------------- text


def from_text(text: str, hint: Any, path: str, current: Any = None) -> Any:
    """The value that a user typed, read as an annotation wants it.

    ``none`` is None; tuples are separated by commas, with or without brackets; a dataclass is given
    by its kind (fields that it shares with ``current`` keep their values), or by the value of its
    first field (a source by its path).

    Raises:
        InputError: the text does not fit; ``path`` and the type wanted are named.
    """
    options = sorted(alternatives(hint), key=_reading_order)
    for option in options:
        try:
            return _read(text, option, path, current, lone_is_tuple=str not in options)
        except ValueError as e:
            if isinstance(e, InputError):
                raise
    choices = nearest(text, kinds(hint)) if kinds(hint) else ""
    raise InputError(f"{path}={text!r} cannot be used; {path} wants {describe(hint)}{choices}")


def _reading_order(option: Any) -> int:
    """Narrow types first: ``3`` is an int before it is a str."""
    order = {type(None): 0, bool: 1, int: 2, float: 3, str: 5}
    return order.get(option, 4)


def _read(text: str, option: Any, path: str, current: Any, *, lone_is_tuple: bool) -> Any:
    """``text`` as exactly this type, or a ValueError."""
    word = text.strip()
    if option is type(None) and word.lower() in _NONE_WORDS:
        return None
    if option is bool and word.lower() in _BOOL_WORDS:
        return _BOOL_WORDS[word.lower()]
    if option is int:
        return int(word) if not _is_exponent(word) else _whole(float(word))
    if option is float:
        return float(word)
    if option is str:
        return text
    if typing.get_origin(option) is typing.Literal:
        for value in typing.get_args(option):
            if word == str(value):
                return value
    if typing.get_origin(option) is tuple:
        bracketed = word[:1] in ("(", "[") and word[-1:] in (")", "]")
        if bracketed or "," in word or lone_is_tuple:
            return _read_tuple(word[1:-1] if bracketed else word, option, path)
    if dataclasses.is_dataclass(option):
        return _read_dataclass(word, option, path, current)
    raise ValueError(text)


def _is_exponent(word: str) -> bool:
    return "e" in word.lower()


def _whole(value: float) -> int:
    if not value.is_integer():
        raise ValueError(value)
    return int(value)


def _read_tuple(inner: str, option: Any, path: str) -> tuple[Any, ...]:
    parts = [p.strip() for p in inner.split(",") if p.strip()]
    elements = element_types(option, len(parts))
    if elements is None:
        raise ValueError(inner)
    return tuple(
        from_text(p, t, f"{path}.{i}") for i, (p, t) in enumerate(zip(parts, elements, strict=True))
    )


def _read_dataclass(word: str, cls: type, path: str, current: Any) -> Any:
    if hasattr(cls, "kind"):
        if word != cls.kind:
            raise ValueError(word)
        shared = field_types(type(current)) if dataclasses.is_dataclass(current) else {}
        return cls(**{name: getattr(current, name) for name in field_types(cls) if name in shared})
    first = next(iter(field_types(cls)), None)
    if first is None or field_types(cls)[first] is not str:
        raise ValueError(word)
    if lacking := [name for name in required(cls) if name != first]:
        raise InputError(
            f"{path}={word!r} cannot be used: a {cls.__name__} has no default for "
            f"{', '.join(lacking)}; {getattr(cls, 'REMEDY', 'start from a file that has one')}"
        )
    return cls(**{first: word})
