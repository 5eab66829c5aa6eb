"""The table of a family: published tensor names, and where each lies in our parameters.

One table serves both directions, partial loading and retrofits. :func:`match` holds it against what
a checkpoint has and says everything that does not fit at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ...errors import InputError
from .configs import with_single_ids
from .files import Stored
from .layouts import Layout


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our parameters, and the published tensor (or, with ``{e}``, tensors) it is.

    Attributes:
        name: published. Of several the first is written, all are read; a checkpoint may have more
            than one of them, which hold the same numbers then, and are all written again. ``{e}``
            (any one letter) stands for a number and is a stacked dimension of ``layout``: an
            expert, for one.
        path: of our parameter, blocks counted from 0 as in ``stack.3.mixer.q_proj.kernel``, however
            the stack keeps them.
        layout: see :mod:`.layouts`. Of several the first is written unless the model was read in
            another one, all are read.
    """

    name: str | tuple[str, ...]
    path: str
    layout: str | tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which it is read."""
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts in which it is read."""
        texts = (self.layout,) if isinstance(self.layout, str) else self.layout
        return tuple(map(Layout.parse, texts))


# How a tensor stands in a file: its dtype and shape.
Form = tuple[np.dtype, tuple[int, ...]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Published:
    """How the world writes down the models of one family.

    Attributes:
        model_types: values of ``model_type`` in a ``config.json``; the first is written.
        rules: the table for a configuration of ours; covers all of the family's parameters.
        config_from: our configuration from the contents of a ``config.json``.
        config_to: the inverse.
        ignored: regular expressions of published names that hold nothing to learn: buffers.
        architectures: values of ``architectures``, by which files without a ``model_type`` are
            known.
        completed: adds what files of this family leave out of ``config.json``, given the shapes of
            their tensors by name; None where they are complete.
    """

    model_types: tuple[str, ...]
    rules: Callable[[Any], Sequence[Rule]]
    config_from: Callable[[Mapping[str, Any]], Any]
    config_to: Callable[[Any], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    completed: Callable[[Mapping[str, Any], Shapes], Mapping[str, Any]] | None = None

    def config(self, contents: Mapping[str, Any], shapes: Callable[[], Shapes]) -> Any:
        """Our configuration from a ``config.json``, and of tensors only what that leaves out.

        Raises:
            InputError: as ``config_from``.
        """
        if self.completed is not None:
            contents = self.completed(contents, shapes())
        return self.config_from(with_single_ids(contents))


@dataclasses.dataclass(frozen=True)
class Piece:
    """One published tensor's share of one of our arrays.

    Attributes:
        name: published.
        layout: how it lies there.
        at: our leading indices: the repeat of a scanned block, the stacked dimensions.
        stored: where it is read; None when the table is used for writing.
        copies: the same under other names.
    """

    name: str
    layout: Layout
    at: tuple[int, ...]
    stored: Stored | None = None
    copies: tuple[Piece, ...] = ()

    @property
    def all(self) -> tuple[Piece, ...]:
        """Itself and its copies."""
        return (self, *self.copies)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays and the pieces that it is made of.

    Attributes:
        path: its keys in the tree of parameters.
        shape: of the array, the dimension of scanned repeats included.
        own_shape: that of one block.
        pieces: in the order of ``at``; together they fill it.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Its path as users see it."""
        return ".".join(map(str, self.path))


def match(
    published: Published,
    config: Any,
    shapes: Mapping[Any, Any],
    stored: Mapping[str, Stored],
    *,
    partial: bool = False,
) -> list[Leaf]:
    """Where each of our arrays is read from.

    Args:
        published: the family's table.
        config: of the model.
        shapes: our abstract parameters; those that no rule speaks of (a retrofit's) are left out.
        stored: what the checkpoint has.
        partial: leave out arrays of which the checkpoint has nothing, and tensors without a rule.

    Raises:
        InputError: tensors that are missing, unknown, misshaped or of no floating dtype; all of
            them by name, with the nearest candidates.
    """
    taken: set[str] = set()
    missing: list[str] = []
    wrong: list[str] = []
    leaves = []
    for leaf, candidates in _leaves(published, config, shapes):
        pieces, absent = [], []
        for names, layouts, at in candidates:
            present = [name for name in names if name in stored]
            if not present:
                absent.append(names[0])
                continue
            taken.update(present)
            found = []
            for name in present:
                tensor = stored[name]
                layout = next((x for x in layouts if x.fits(tensor.shape, leaf.own_shape)), None)
                if layout is None:
                    want = " or ".join(str(x.published_shape(leaf.own_shape)) for x in layouts)
                    wrong.append(f"{name} has shape {tensor.shape}, this model needs {want}")
                elif not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.kind != "V":
                    wrong.append(f"{name} has dtype {tensor.dtype}, a floating one is needed")
                else:
                    found.append(Piece(name, layout, at, tensor))
            if found:
                pieces.append(_with_copies(found))
        if partial and len(absent) == len(candidates):
            continue
        missing += absent
        leaves.append(dataclasses.replace(leaf, pieces=tuple(pieces)))
    ignored = [re.compile(pattern) for pattern in published.ignored]
    unknown = [
        name
        for name in stored
        if name not in taken and not any(pattern.fullmatch(name) for pattern in ignored)
    ]
    if missing or wrong or (unknown and not partial):
        raise InputError(_complaint(missing, wrong, [] if partial else unknown))
    return leaves


def layout_of_model(
    published: Published,
    config: Any,
    shapes: Mapping[Any, Any],
    read_as: Mapping[str, Form] | None = None,
) -> list[Leaf]:
    """What each of our arrays is written as.

    Args:
        published: the family's table.
        config: of the model.
        shapes: its parameters, or what stands for them.
        read_as: forms in which tensors of this model were read; they are written under the same
            name and in the same layout. Others have the first ones of their rule.

    Raises:
        InputError: the model has arrays that published checkpoints have no name for.
    """
    read_as = read_as or {}
    leaves = []
    for leaf, candidates in _leaves(published, config, shapes):
        pieces = []
        for names, layouts, at in candidates:
            found = []
            for name in [name for name in names if name in read_as] or names[:1]:
                layout = layouts[0]
                if name in read_as:
                    shape = read_as[name][1]
                    layout = next((x for x in layouts if x.fits(shape, leaf.own_shape)), layout)
                found.append(Piece(name, layout, at))
            pieces.append(_with_copies(found))
        leaves.append(dataclasses.replace(leaf, pieces=tuple(pieces)))
    ours = {tuple(_key(k) for k in path) for path, _ in jax.tree.leaves_with_path(shapes)}
    without = sorted(".".join(map(str, path)) for path in ours - {leaf.path for leaf in leaves})
    if without:
        raise InputError(
            f"published checkpoints have no name for {', '.join(compact(without))}; merge or leave "
            "out what was added to the model, or save it with format='orbax'"
        )
    return leaves


def _with_copies(pieces: Sequence[Piece]) -> Piece:
    first, *copies = pieces
    return dataclasses.replace(first, copies=tuple(copies))


_Candidates = list[tuple[tuple[str, ...], tuple[Layout, ...], tuple[int, ...]]]


def _leaves(
    published: Published, config: Any, shapes: Mapping[Any, Any]
) -> Iterable[tuple[Leaf, _Candidates]]:
    """Every array that the table speaks of, and for each of its pieces the names and layouts."""
    found: dict[tuple, tuple[Leaf, _Candidates]] = {}
    stacks = {key: _Stack(tree) for key, tree in shapes.items() if _Stack.is_one(tree)}
    for rule in published.rules(config):
        first, *rest = rule.path.split(".")
        repeat: tuple[int, ...] = ()
        if first in stacks:
            inner, repeat = stacks[first].place(int(rest[0]))
            path = (first, *inner, *_keys(stacks[first].block(inner), rest[1:]))
        else:
            path = _keys(shapes, [first, *rest])
        array = _get(shapes, path)
        own = tuple(array.shape[len(repeat) :])
        _, candidates = found.setdefault(path, (Leaf(path, tuple(array.shape), own, ()), []))
        counts = own[: rule.layouts[0].stacked]
        for stacked in np.ndindex(*counts):
            names = tuple(_numbered(name, stacked) for name in rule.names)
            candidates.append((names, rule.layouts, (*repeat, *map(int, stacked))))
    return found.values()


class _Stack:
    """A :class:`~jaxalope.layers.stack.Stack`'s parameters, seen as a list of blocks."""

    def __init__(self, tree: Mapping[str, Any]):
        self.tree = tree
        self.sizes = {part: len(tree.get(part, ())) for part in ("head", "body", "tail")}
        leaf = next(iter(jax.tree.leaves(tree.get("body", {}))), None)
        self.repeats = 0 if leaf is None else leaf.shape[0]

    @staticmethod
    def is_one(tree: Any) -> bool:
        return (
            isinstance(tree, Mapping) and len(tree) > 0 and tree.keys() <= {"head", "body", "tail"}
        )

    def place(self, index: int) -> tuple[tuple[str, int], tuple[int, ...]]:
        """``((part, i), (repeat,) or ())`` of block ``index``."""
        head, period = self.sizes["head"], self.sizes["body"]
        if index < head:
            return ("head", index), ()
        index -= head
        if index < period * self.repeats:
            return ("body", index % period), (index // period,)
        return ("tail", index - period * self.repeats), ()

    def block(self, inner: tuple[str, int]) -> Mapping[str, Any]:
        return self.tree[inner[0]][inner[1]]


def _keys(tree: Any, parts: Sequence[str]) -> tuple[Any, ...]:
    """The tree's own keys for a dotted path: lists have integers."""
    keys = []
    for part in parts:
        key = part if part in tree else int(part) if part.isdigit() else part
        tree = tree[key]
        keys.append(key)
    return tuple(keys)


def _get(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _key(entry: Any) -> Any:
    return getattr(entry, "key", getattr(entry, "idx", entry))


def _numbered(name: str, numbers: Sequence[int]) -> str:
    for number in numbers:
        name = re.sub(r"\{[a-z]\}", str(number), name, count=1)
    return name


# ---------------------------------------------------------------------------------------- messages


def compact(names: Sequence[str]) -> list[str]:
    """Names that differ in one number as one: ``layers.{0-2,5}.norm.weight``; order is kept."""
    numbers = re.compile(r"(?<![A-Za-z\d])\d+(?![A-Za-z\d])")
    groups: dict[tuple, list[list[str]]] = {}
    for name in names:
        groups.setdefault((numbers.sub("#", name),), []).append(numbers.findall(name))
    out = []
    for (pattern,), found in groups.items():
        parts = pattern.split("#")
        text = parts[0]
        for i, part in enumerate(parts[1:]):
            text += _ranges(sorted({int(numbers[i]) for numbers in found})) + part
        out.append(text)
    return out


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _complaint(missing: list[str], wrong: list[str], unknown: list[str]) -> str:
    lines = ["the tensors of this checkpoint do not fit its configuration:"]
    strangers = compact(unknown)
    for name in compact(missing):
        near = difflib.get_close_matches(name, strangers, n=2, cutoff=0.75)
        lines.append(f"  missing {name}" + (f" (is it {' or '.join(near)}?)" if near else ""))
    lines += [f"  {text}" for text in wrong]
    lines += [f"  unknown {name}" for name in strangers]
    return "\n".join(lines)
