"""Where a run begins that does not begin with random parameters: ``experiment.init_from``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from ..configs.experiment import AutoDeco, Experiment
from ..data.tokenizers import load_tokenizer
from ..errors import InputError
from ..model.checkpoint import document_dir, read_document, restore_params
from ..model.registry import config_from_dict, config_to_dict
from ..model.retrofit import build, retrofits_from_list
from ..sharding import abstract, path_name
from .workdir import CHECKPOINTS, TOKENIZER


def check_source(experiment: Experiment, workdir: epath.PathLike) -> None:
    """Raise an :class:`InputError` unless a new run could begin.

    So a wrong ``init_from`` is told before the workdir is made. A run with checkpoints needs no
    source any more.
    """
    if (epath.Path(workdir).expanduser() / CHECKPOINTS).exists():
        return
    path = experiment.init_from
    if path is None:
        if isinstance(experiment.objective, AutoDeco):
            raise InputError(
                "init_from=None: objective=autodeco trains heads on a finished model; set "
                "init_from to its workdir"
            )
        return
    _base_names(experiment)
    saved = document_dir(path) / TOKENIZER
    theirs, ours = load_tokenizer(saved), load_tokenizer(experiment.data.tokenizer)
    if theirs.fingerprint != ours.fingerprint:
        raise InputError(
            f"data.tokenizer={experiment.data.tokenizer!r} is not the tokenizer of init_from="
            f"{path!r}, for whose model ids mean something else; set data.tokenizer={str(saved)!r}"
        )


def load_base(experiment: Experiment, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the run that ``experiment.init_from`` names, by name.

    Args:
        experiment: its ``init_from`` is not None.
        wanted: its parameters, as ``ShapeDtypeStruct`` with shardings; those that the other run's
            model has are loaded so.

    Raises:
        InputError: there is no such run, it has a retrofit that this experiment lacks, or its model
            has other parameters; names the fields of the configuration that differ.
    """
    names, fields = _base_names(experiment)
    if fields:
        warnings.warn(
            f"init_from={experiment.init_from!r} was trained with another value of "
            f"{'; '.join(fields)}",
            stacklevel=2,
        )
    return restore_params(experiment.init_from, {name: wanted[name] for name in names})


def _base_names(experiment: Experiment) -> tuple[list[str], list[str]]:
    """``(parameters of the source, fields of its configuration that differ)``; all shapes agree."""
    path = experiment.init_from
    if not epath.Path(path).expanduser().exists():
        raise InputError(
            f"init_from={path!r} does not exist; give the workdir of a finished run (the demo's is "
            "made by: python -m jaxalope.train --config=demo --workdir=runs/demo)"
        )
    source = read_document(path, "experiment")
    retrofits = retrofits_from_list(source.get("retrofits", []))
    missing = [r for r in retrofits if r not in experiment.retrofits]
    if missing:
        raise InputError(
            f"init_from={path!r} has a model with {missing[0]}, which is not among this "
            f"experiment's retrofits={list(experiment.retrofits)}; list the same one"
        )
    shapes, configs = [], (config_from_dict(source["model"]), experiment.model)
    for config in configs:
        params = abstract(lambda key, config=config: build(config, retrofits, key))[1]
        leaves = jax.tree.leaves_with_path(params)
        shapes.append({path_name(at): leaf.shape for at, leaf in leaves})
    theirs, ours = (config_to_dict(config) for config in configs)
    fields = [
        f"model.{name}: {theirs.get(name)} there, {ours.get(name)} here"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"init_from={path!r} holds another model, which differs in {'; '.join(fields)}; set "
            "these fields as that run did"
        )
    return list(shapes[0]), fields
