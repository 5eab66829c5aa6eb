"""``--set a.b=value``: a new experiment with some fields changed, typed by their annotations."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import InputError
from ..model import fields
from .experiment import with_part


@dataclasses.dataclass
class _Change:
    """What was asked of one place: a text for itself, changes below it, or both in that order.

    Whichever was given first: a LoRA run's `optimizer.trainable` must outlive an `optimizer=adamw`
    after it.
    """

    text: str | None = None
    below: dict[str, _Change] = dataclasses.field(default_factory=dict)


def overlay(value: Any, settings: Sequence[str]) -> Any:
    """``value`` (a nested frozen dataclass) with every ``path=text`` of ``settings`` applied.

    All are applied before anything is validated, so that two fields which must agree can be changed
    together; of two settings of one field the later wins. ``optimizer=adamw`` picks another
    alternative, whose fields can be set in the same call, before or after it.
    ``data.sources.0.path=x`` reaches into a tuple; one past its end appends.
    ``model.autoencoder=SOURCE`` takes a part of the model, and its configuration, from another run
    (:func:`~.experiment.with_part`), before all else.

    Raises:
        InputError: no ``=``, an unknown field (the nearest one is suggested), or a value that the
            field's type does not admit (the type wanted is named).
    """
    value, settings = _with_parts(value, settings)
    root = _Change()
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise InputError(f"--set {setting!r}: write it as path.to.field=value")
        node = root
        for key in keys:
            node = node.below.setdefault(key, _Change())
        node.text = text
    return _apply(value, root, type(value), "", value)


def _with_parts(value: Any, settings: Sequence[str]) -> tuple[Any, list[str]]:
    """``value`` with the parts that ``model.autoencoder=SOURCE`` names, and all other settings."""
    others = []
    for setting in settings:
        path, _, source = setting.partition("=")
        owner, _, name = path.strip().partition(".")
        if owner == "model" and name in getattr(getattr(value, "model", None), "PARTS", ()):
            value = with_part(value, name, source)
        else:
            others.append(setting)
    return value, others


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    """The path of every field that :func:`overlay` can set in ``value``."""
    for name in fields.field_types(type(value)):
        child = getattr(value, name)
        path = f"{prefix}{name}"
        yield path
        if dataclasses.is_dataclass(child):
            yield from paths(child, f"{path}.")


def _apply(value: Any, change: _Change, hint: Any, path: str, root: Any) -> Any:
    if change.text is not None:
        if hint is Any or _has_only_fields(hint):
            raise InputError(
                f"--set {path}={change.text}: set its fields one by one, as {path}.field=value, or "
                "start from another experiment"
            )
        value = fields.from_text(change.text, hint, path, current=value)
    if not change.below:
        return value
    if isinstance(value, tuple):
        return _apply_to_tuple(value, change, hint, path, root)
    if not dataclasses.is_dataclass(value):
        name = next(iter(change.below))
        raise InputError(f"--set {path}.{name}: {path} is {value!r} and has no fields")
    types = fields.field_types(type(value))
    for name in change.below:
        if name not in types:
            raise _unknown(value, name, path, root)
    changed = {
        name: _apply(
            getattr(value, name), below, types[name], f"{path}.{name}" if path else name, root
        )
        for name, below in change.below.items()
    }
    return dataclasses.replace(value, **changed)


def _has_only_fields(hint: Any) -> bool:
    """Whether this is a group of settings that no single text can stand for."""
    if not dataclasses.is_dataclass(hint) or hasattr(hint, "kind"):
        return False
    return next(iter(fields.field_types(hint).values())) is not str


def _apply_to_tuple(value: tuple, change: _Change, hint: Any, path: str, root: Any) -> tuple:
    option = next(h for h in fields.alternatives(hint) if typing.get_origin(h) is tuple)
    items = list(value)
    for key, below in change.below.items():
        if not key.isdecimal() or int(key) > len(items):
            raise InputError(
                f"--set {path}.{key}: {path} has {len(items)} elements; name one from 0 to "
                f"{len(items) - 1}, or {len(items)} to append"
            )
        index = int(key)
        types = fields.element_types(option, max(len(items), index + 1))
        if types is None:
            raise InputError(f"--set {path}.{key}: {path} wants {fields.describe(hint)}")
        if index == len(items):
            items.append(_appended(below, types[index], f"{path}.{key}"))
        items[index] = _apply(items[index], below, types[index], f"{path}.{key}", root)
    return tuple(items)


def _appended(change: _Change, hint: Any, path: str) -> Any:
    """What stands at a place past the end of a tuple before the change is made there."""
    kinds = fields.kinds(hint)
    if change.text is not None or not change.below or not kinds:
        return None
    if len(kinds) > 1:
        raise InputError(
            f"--set {path}.{next(iter(change.below))}: there is no {path} yet; say which it is "
            f"first, as {path}=KIND (one of {', '.join(kinds)})"
        )
    (cls,) = kinds.values()
    if lacking := fields.required(cls):
        raise InputError(
            f"--set {path}.{next(iter(change.below))}: there is no {path} yet, and a "
            f"{cls.__name__} has no default for {', '.join(lacking)}; "
            f"{getattr(cls, 'REMEDY', 'start from a file that has one')}"
        )
    return cls()


def _unknown(value: Any, name: str, path: str, root: Any) -> InputError:
    """Suggest a neighbour, or else the place elsewhere that has a field of this very name."""
    own = fields.field_types(type(value))
    prefix = f"{path}." if path else ""
    near = fields.nearest(name, own)
    if not near:
        elsewhere = [p for p in paths(root) if p.rpartition(".")[2] == name]
        near = fields.nearest(f"{prefix}{name}", elsewhere or paths(root))
    return InputError(
        f"--set {prefix}{name}: {type(value).__name__} has no field {name!r}{near} "
        f"(fields: {', '.join(own)})"
    )
