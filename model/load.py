"""``load``: a model from where training left it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from ..data.tokenizers import load_tokenizer
from ..errors import InputError
from ..sharding import AxisRules, abstract, shardings
from .checkpoint import document_dir, read_document, restore_params
from .handle import Model
from .registry import config_from_dict
from .retrofit import build, retrofits_from_list


def load(
    path: epath.PathLike,
    *,
    step: int | None = None,
    ema: bool = False,
    mesh: Mesh | None = None,
    rules: AxisRules | None = None,
    dtype: str | None = None,
) -> Model:
    """The model of a training workdir, retrofits and tokenizer included; needs only that folder.

    Args:
        path: the workdir, its ``checkpoints/``, or one checkpoint in there.
        step: which checkpoint; the newest readable one if None.
        ema: the moving average of the parameters, where training kept one.
        mesh: the devices to lay the parameters out on; one device if None.
        rules: how; the defaults if None.
        dtype: compute dtype, ``"float32"`` or ``"bfloat16"``; as trained if None.

    Raises:
        InputError: there is no readable checkpoint, or it does not fit the mesh.
    """
    if not epath.Path(path).exists():
        raise InputError(f"model={str(path)!r} does not exist; give a training workdir")
    # Each of these falls back from a damaged checkpoint by itself; what describes the model is the
    # same in all checkpoints of a workdir.
    experiment = read_document(path, "experiment", step)
    config = config_from_dict(experiment["model"])
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    retrofits = retrofits_from_list(experiment.get("retrofits", []))
    rules = rules or AxisRules()
    graphdef, shapes, axes = abstract(lambda key: build(config, retrofits, key))
    if mesh is not None:
        shapes = _placed(shapes, shardings(shapes, axes, mesh, rules))
    params = restore_params(path, shapes, step=step, ema=ema)
    tokenizer = load_tokenizer(document_dir(path, step) / "tokenizer")
    add_bos = experiment["data"].get("add_bos", False)
    return Model(config, graphdef, params, tokenizer, mesh, rules, add_bos)


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        places,
    )
