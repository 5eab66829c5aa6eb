"""Directories as the world publishes models: ``config.json``, weights, tokenizer; both ways."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from ..data.tokenizers import load_tokenizer
from ..errors import InputError
from ..sharding import AxisRules, Params, abstract, path_name, shardings
from .exchange import (
    LoadPlan,
    Origin,
    Published,
    Sources,
    check_types,
    fill,
    layout_of_model,
    match,
    plan,
    read_directory,
    read_object,
    write_weights,
)
from .exchange.write import json_text
from .fields import float_dtype
from .generation_defaults import GenerationDefaults
from .handle import Model
from .registry import FAMILIES, build_model, family_of, run_as, with_dtype

CONFIG = "config.json"
GENERATION = "generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


def is_published(directory: epath.Path) -> bool:
    """Whether this is a directory in the published form."""
    return (directory / CONFIG).exists()


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A published model that is about to be read: all that is known from headers.

    Attributes:
        directory: where it lies.
        config: our configuration.
        graphdef: the module's structure.
        shapes: its abstract parameters, with shardings under a mesh.
        plan: what is read, and where it goes.
        origin: what it is remembered by.
    """

    directory: epath.Path
    config: Any
    graphdef: nnx.GraphDef
    shapes: Params
    plan: LoadPlan
    origin: Origin
    mesh: Mesh | None
    rules: AxisRules

    def load(self, progress: Callable[[int], None] | None = None, *, lazily: bool = False) -> Model:
        """The model.

        Args:
            progress: as for :meth:`.exchange.LoadPlan.load`.
            lazily: put a :class:`.exchange.Lazy` in the place of each array.
        """
        arrays = self.plan.lazily() if lazily else self.plan.load(progress)
        found = tokenizer_of(self.directory)
        tokenizer = None if found is None else load_tokenizer(found)
        return Model(
            self.config,
            self.graphdef,
            fill(self.shapes, arrays),
            tokenizer,
            self.mesh,
            self.rules,
            add_bos=getattr(tokenizer, "add_bos", False),
            defaults=GenerationDefaults.from_json(read_generation(self.directory)),
            origin=self.origin,
        )


def open_published(
    directory: epath.Path,
    *,
    mesh: Mesh | None = None,
    rules: AxisRules | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> PublishedModel:
    """Read everything about a published model but its weights.

    Args:
        directory: holds ``config.json`` and what :func:`.exchange.read_directory` reads.
        mesh: the devices to lay the parameters out on; one device if None.
        rules: how; the defaults if None.
        dtype: compute dtype; bfloat16 for models published in 16 bits if None.
        param_dtype: of the parameters; each as it is stored if None.
        run: changes of how it runs, as :func:`.registry.run_as` takes them.

    Raises:
        InputError: a family or an option that is not here, weights that do not fit the
            configuration, files that are damaged or absent, or parameters that do not divide over
            the mesh.
    """
    param_dtype = float_dtype("param_dtype", param_dtype)
    config, published, contents = read_config(directory)
    if dtype is not None:
        config = with_dtype(config, dtype)
    config = run_as(config, run or {})
    rules = rules or AxisRules()
    graphdef, shapes, axes = abstract(lambda key: build_model(config, key))
    places = None if mesh is None else shardings(shapes, axes, mesh, rules)
    shapes = _abstract(shapes, places, param_dtype)
    stored = read_directory(directory)
    leaves = match(published, config, shapes, stored)
    tensors = {
        piece.name: (np.dtype(param_dtype or piece.stored.dtype), piece.stored.shape)
        for leaf in leaves
        for first in leaf.pieces
        for piece in first.all
    }
    return PublishedModel(
        directory,
        config,
        graphdef,
        shapes,
        plan(leaves, shapes, stored_dtypes=param_dtype is None),
        Origin(contents, tensors),
        mesh,
        rules,
    )


def read_config(directory: epath.Path) -> tuple[Any, Any, dict[str, Any]]:
    """``(our configuration, the family's table, contents)`` of a ``config.json``.

    Raises:
        InputError: it is no JSON object, of no family that is here, or has an option that is not.
    """
    contents = read_object(directory / CONFIG)
    published = _published(contents, directory / CONFIG)

    def shapes():
        return {name: stored.shape for name, stored in read_directory(directory).items()}

    return published.config(contents, shapes), published, contents


def _published(contents: Mapping[str, Any], path: epath.Path) -> Published:
    """The table of the family that a ``config.json`` is of."""
    model_type = contents.get("model_type")
    check_types(contents, {"architectures": tuple[str, ...] | None}, path)
    architectures = contents.get("architectures") or ()
    tables = [family.published for family in FAMILIES.values() if family.published is not None]
    for published in tables:
        # Configurations that were never registered with transformers are saved without their type.
        if (
            model_type in published.model_types
            if model_type
            else set(architectures) & set(published.architectures)
        ):
            return published
    known = sorted(name for published in tables for name in published.model_types)
    raise InputError(
        f"{path}: model_type={model_type!r} is no family that is here; these are: "
        f"{', '.join(known)}"
    )


def tokenizer_of(directory: epath.Path) -> epath.Path | None:
    """Where a published model's tokenizer is; None if it has none."""
    found = any((directory / name).exists() for name in _TOKENIZERS)
    return directory if found else None


def read_generation(directory: epath.Path) -> dict[str, Any]:
    """The contents of a published model's ``generation_config.json``; nothing if it has none."""
    path = directory / GENERATION
    return read_object(path) if path.exists() else {}


def load_into(
    directory: epath.Path, config: Any, wanted: Mapping[str, Any], *, partial: bool = False
) -> dict[str, Any]:
    """Parameters of a published model by dotted name, for a model of this configuration.

    Args:
        directory: as for :func:`open_published`.
        config: of the model that they are for.
        wanted: ``ShapeDtypeStruct`` by name: the dtypes and shardings to read them in. Names that
            no published tensor fills, those of retrofits, are passed over.
        partial: take what the checkpoint has, instead of all that the model needs.

    Raises:
        InputError: as :func:`open_published`.
    """
    arrays = plan_into(directory, config, wanted, partial=partial).load()
    return {".".join(map(str, path)): array for path, array in arrays.items()}


def plan_into(
    directory: epath.Path, config: Any, wanted: Mapping[str, Any], *, partial: bool = False
) -> LoadPlan:
    """What :func:`load_into` would read, with its arguments and errors."""
    _, shapes, _ = abstract(lambda key: build_model(config, key))
    shapes = jax.tree.map_with_path(lambda path, x: wanted.get(path_name(path), x), shapes)
    leaves = match(_table(config), config, shapes, read_directory(directory), partial=partial)
    return plan(leaves, shapes, stored_dtypes=False)


def write_published(
    directory: epath.Path,
    model: Model,
    *,
    shard_size: int,
    dtype: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a model's files into ``directory``, which exists.

    Args:
        directory: takes ``config.json``, safetensors, tokenizer and generation defaults.
        model: of any family.
        shard_size: bytes a file.
        dtype: of all tensors; as they were read, or as they are, if None.
        progress: called with the number of bytes after each tensor.

    Raises:
        InputError: something of the model has no place in the published form.
    """
    sources = sources_of(model, dtype)
    contents = _contents(model)
    key = "dtype" if "dtype" in contents and "torch_dtype" not in contents else "torch_dtype"
    contents[key] = str(_usual_dtype(sources))
    if model.tokenizer is not None:
        for name, content in model.tokenizer.files().items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
    defaults = model.defaults.to_json()
    if defaults:
        (directory / GENERATION).write_text(json_text(defaults))
    write_weights(directory, sources, shard_size=shard_size, progress=progress)
    (directory / CONFIG).write_text(json_text(contents))


def _contents(model: Model) -> dict[str, Any]:
    """A model's ``config.json``: as it was read, but for what has changed since."""
    published = _table(model.config)
    ours = published.config_to(model.config)
    if model.origin is None:
        return ours
    theirs = dict(model.origin.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Unknown fields were named when it was read.
        shapes = {name: shape for name, (_, shape) in model.origin.tensors.items()}
        before = published.config_to(published.config(theirs, lambda: shapes))
    absent = object()
    return theirs | {
        name: value for name, value in ours.items() if value != before.get(name, absent)
    }


def sources_of(model: Model, dtype: str | None = None) -> Sources:
    """The published tensors of a model; each is made when it is asked for.

    Raises:
        InputError: something of the model has no place in the published form.
    """
    dtype = float_dtype("dtype", dtype)
    read_as = model.origin.tensors if model.origin else {}
    leaves = layout_of_model(_table(model.config), model.config, model.params, read_as)

    def get(path):
        x = model.params
        for key in path:
            x = x[key]
        return x

    arrays = [get(leaf.path) for leaf in leaves]
    return Sources(leaves, get, arrays, dtype=dtype and np.dtype(dtype), read_as=read_as)


def published_tensors(model: Model, dtype: str | None = None) -> dict[str, np.ndarray]:
    """All published tensors of a model, by name, on the host.

    Raises:
        InputError: something of the model has no place in the published form.
    """
    sources = sources_of(model, dtype)
    return {name: sources.tensor(name) for name in sources.tensors}


def _table(config: Any) -> Published:
    family = family_of(config)
    if FAMILIES[family].published is None:
        raise InputError(
            f"models of the family {family!r} have no published form; save with format='orbax'"
        )
    return FAMILIES[family].published


def _usual_dtype(sources: Sources) -> np.dtype:
    """The dtype of most of a model's numbers."""
    count: dict[np.dtype, int] = {}
    for dtype, shape in sources.tensors.values():
        count[dtype] = count.get(dtype, 0) + int(np.prod(shape, dtype=np.int64))
    return max(count, key=count.get)


def _abstract(shapes: Params, places: Params | None, param_dtype: str | None) -> Params:
    dtype = None if param_dtype is None else jnp.dtype(param_dtype)

    def one(x, place=None):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place)

    return jax.tree.map(one, shapes) if places is None else jax.tree.map(one, shapes, places)
