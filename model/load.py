"""``load``: a model from where training left it, or from where the world published it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ..data.tokenizers import load_tokenizer
from ..errors import InputError
from ..sharding import AxisRules, abstract, path_name, shardings
from .checkpoint import document_dir, has_document, read_document, restore_params
from .exchange import Lazy, Origin, hub
from .fields import float_dtype
from .generation_defaults import GenerationDefaults
from .handle import Model
from .int8 import as_stored, is_int8
from .published import is_published, open_published, read_config
from .registry import config_from_dict, run_as, with_dtype
from .retrofit import build, retrofits_from_list


def load(
    path: epath.PathLike,
    *,
    step: int | None = None,
    ema: bool = False,
    mesh: Mesh | None = None,
    rules: AxisRules | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    run: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Model:
    """A model, its tokenizer and its generation defaults.

    Args:
        path: a training workdir, its ``checkpoints/``, or one checkpoint in there; a directory in
            the published form (``config.json``; safetensors, or else PyTorch's own files); or a
            hub id, ``organisation/name`` or ``organisation/name@revision``.
        step: which checkpoint of a workdir; the newest readable one if None.
        ema: a workdir's moving average of the parameters, where training kept one.
        mesh: the devices to lay the parameters out on; one device if None.
        rules: how; the defaults if None.
        dtype: compute dtype, ``"float32"`` or ``"bfloat16"``; as trained or published if None.
        param_dtype: of the parameters, ``"float32"``, ``"bfloat16"`` or ``"float16"``; as stored if
            None.
        run: fields of its configuration that say how it runs, and not what it is, to change:
            ``{"scan_layers": False, "decode_implementation": "pallas_gpu"}``. With its layers
            apart (``scan_layers=False``) a model decodes faster on a CPU and on a GPU; a published
            one is read that way, a workdir's is taken apart once it is read.
        progress: called with a number of parameters whenever as many have been read.

    Raises:
        InputError: there is no readable model, it does not fit the mesh, or does not run that way.
    """
    param_dtype = float_dtype("param_dtype", param_dtype)
    directory = locate(path)
    if is_published(directory):
        _refuse_choice(path, step, ema)
        return open_published(
            directory, mesh=mesh, rules=rules, dtype=dtype, param_dtype=param_dtype, run=run
        ).load(progress)
    model = _open_workdir(directory, step, ema, mesh, rules, dtype, param_dtype, run)
    apart = run_as(model.config, run or {}) != model.config
    if apart and not model.config.scan_layers:
        raise InputError(
            f"scan_layers=True: {directory} was trained with its layers apart; leave it out"
        )
    params = restore_params(directory, model.params, step=step, ema=ema)
    if progress is not None:
        progress(sum(x.size for x in jax.tree.leaves(params)))
    model = dataclasses.replace(model, params=params)
    return model.unrolled() if apart else model


def open_lazily(path: epath.PathLike, *, step: int | None = None, ema: bool = False) -> Model:
    """A model as :func:`load` returns it, with a ``Lazy`` in the place of every array.

    For those that take the arrays one after another; none is read before its ``load()``. All are of
    one checkpoint, whatever a run saves in the meantime.

    Raises:
        InputError: as :func:`load`; from an array's ``load()``, if the checkpoint is damaged or was
            deleted since (the one before it is not read then, as its arrays are of another step).
    """
    directory = pinned(path, step=step, ema=ema)
    if is_published(directory):
        return open_published(directory).load(lazily=True)
    step = int(directory.name)
    model = _open_workdir(directory, step, ema)

    def lazy(path, x):
        name = path_name(path)

        def read():
            try:
                found = restore_params(
                    directory.parent, {name: x}, step=step, ema=ema, partial=True
                )
            except InputError as error:
                raise InputError(
                    f"{name} of {step=} cannot be read, and arrays of two steps do "
                    f"not go together: {error}; begin again with another step, or with a copy of "
                    "this one if the run goes on and deletes it"
                ) from error
            return found[name]

        return Lazy(x.shape, np.dtype(x.dtype), read)

    return dataclasses.replace(model, params=jax.tree.map_with_path(lazy, model.params))


def pinned(path: epath.PathLike, *, step: int | None = None, ema: bool = False) -> epath.Path:
    """The directory with the weights that ``path``, ``step`` and ``ema`` name now.

    A published model's own, or that of one checkpoint: what is read there later is of one step.

    Raises:
        InputError: as :func:`load`.
    """
    directory = locate(path)
    if is_published(directory):
        _refuse_choice(path, step, ema)
        return directory
    return document_dir(directory, step).parent


def _refuse_choice(path: epath.PathLike, step: int | None, ema: bool) -> None:
    """Raise if a choice is made among the weights of a published model."""
    if step is not None or ema:
        raise InputError(
            f"step={step}, ema={ema}: {path} is a published model, which has one set of weights"
        )


def saved_config(path: epath.PathLike, field: str = "model") -> Any:
    """The configuration of the model that ``path`` names, as :func:`load` would find it.

    Raises:
        InputError: there is none; ``field`` is what the message calls it.
    """
    directory = locate(path, field)
    if is_published(directory):
        return read_config(directory)[0]
    return config_from_dict(read_document(directory, "experiment")["model"])


def _open_workdir(
    directory: epath.Path,
    step: int | None,
    ema: bool,
    mesh: Mesh | None = None,
    rules: AxisRules | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> Model:
    """The model of a workdir with abstract parameters, its layers as they are stored."""
    # Each of these falls back from a damaged checkpoint by itself; what describes the model is the
    # same in all checkpoints of a workdir.
    experiment = read_document(directory, "experiment", step)
    config = config_from_dict(experiment["model"])
    if dtype is not None:
        config = with_dtype(config, dtype)
    # Whether layers are scanned is as they are stored.
    config = run_as(config, {name: x for name, x in (run or {}).items() if name != "scan_layers"})
    retrofits = retrofits_from_list(experiment.get("retrofits", []))
    rules = rules or AxisRules()
    trees = read_document(directory, "checkpoint", step)["trees"]
    if ema and "ema" not in trees:
        raise InputError(
            f"{ema=}: {directory} kept no moving average of the parameters; leave ema out, or "
            "train with one"
        )
    stored = trees["ema" if ema else "params"]
    graphdef, shapes, axes = abstract(lambda key: as_stored(build(config, retrofits, key), stored))
    places = None if mesh is None else shardings(shapes, axes, mesh, rules)
    documents = document_dir(directory, step)
    tokenizer = documents / "tokenizer"
    known = {
        name: read_document(directory, name, step)
        for name in ("generation", "origin")
        if has_document(directory, name, step)
    }
    return Model(
        config,
        graphdef,
        _abstract(shapes, places, stored, param_dtype),
        load_tokenizer(tokenizer) if tokenizer.exists() else None,
        mesh,
        rules,
        experiment["data"].get("add_bos", False),
        defaults=GenerationDefaults.from_json(known.get("generation", {})),
        origin=Origin.from_json(known["origin"]) if "origin" in known else None,
    )


def locate(path: epath.PathLike, field: str = "model") -> epath.Path:
    """The directory that ``path`` names: itself, or where the hub's files lie.

    Raises:
        InputError: there is none; ``field`` is what the message calls it.
    """
    directory = epath.Path(path).expanduser()
    if directory.exists():
        return directory
    if hub.is_hub_id(str(path)):
        return hub.fetch(str(path), field)
    raise InputError(
        f"{field}={str(path)!r} does not exist; give the workdir of a training run, a directory "
        "with a published model, or a hub id (organisation/name)"
    )


def _abstract(shapes: Any, places: Any, stored: Any, param_dtype: str | None) -> Any:
    """Shapes, placed, in the dtypes that are stored."""

    def one(path, x, place=None):
        kept = stored.get(path_name(path))
        dtype = kept[0] if kept else x.dtype
        if param_dtype is not None and not is_int8(path_name(path), x):
            dtype = param_dtype
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=place)

    if places is None:
        return jax.tree.map_with_path(one, shapes)
    return jax.tree.map_with_path(one, shapes, places)
