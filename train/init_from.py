"""Where a run begins that does not begin with random parameters: ``experiment.init_from``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from ..configs.experiment import Experiment, Part
from ..configs.objectives import AutoDeco
from ..data.tokenizers import load_tokenizer
from ..errors import InputError
from ..model.checkpoint import document_dir, has_document, read_document, restore_params
from ..model.load import locate, saved_config
from ..model.published import (
    is_published,
    load_into,
    plan_into,
    read_config,
    read_generation,
    tokenizer_of,
)
from ..model.registry import config_from_dict, config_to_dict, family_of
from ..model.retrofit import build, retrofits_from_list
from ..sharding import abstract, path_name
from .workdir import CHECKPOINTS, GENERATION, TOKENIZER


def check_source(experiment: Experiment, workdir: epath.PathLike) -> None:
    """Raise an :class:`InputError` unless a new run could begin.

    So a wrong ``init_from`` is told before the workdir is made. A run with checkpoints needs no
    source any more.
    """
    if (epath.Path(workdir).expanduser() / CHECKPOINTS).exists():
        return
    for part in experiment.parts:
        field, config = f"model.{part.name}", getattr(experiment.model, part.name)
        _check_part(part, config)
        saved = _tokenizer_of(locate(part.source, field))
        _check_tokenizer(saved, experiment, f"{field}={part.source!r}")
    path = experiment.init_from
    if path is None:
        if isinstance(experiment.objective, AutoDeco):
            raise InputError(
                "init_from=None: objective=autodeco trains heads on a finished model; set "
                "init_from to its workdir"
            )
        return
    source = locate(path, "init_from")
    if is_published(source):
        _published_differences(source, experiment)
        plan_into(source, experiment.model, {})
    else:
        _base_names(experiment, source)
    _check_tokenizer(_tokenizer_of(source), experiment, f"init_from={path!r}")


def _tokenizer_of(source: epath.Path) -> epath.Path | None:
    return tokenizer_of(source) if is_published(source) else document_dir(source) / TOKENIZER


def _check_tokenizer(saved: epath.Path | None, experiment: Experiment, of: str) -> None:
    if saved is None:
        return
    theirs, ours = load_tokenizer(saved), load_tokenizer(experiment.data.tokenizer)
    if theirs.fingerprint != ours.fingerprint:
        raise InputError(
            f"data.tokenizer={experiment.data.tokenizer!r} is not the tokenizer of {of}, for whose "
            f"model ids mean something else; set data.tokenizer={str(saved)!r}"
        )


def _check_part(part: Part, config: Any) -> None:
    """Raise an InputError unless the source's model is of this configuration."""
    theirs, ours = (
        config_to_dict(c) for c in (saved_config(part.source, f"model.{part.name}"), config)
    )
    # How it is run may differ.
    fields = [n for n in dict.fromkeys([*theirs, *ours]) if n != "dtype"]
    others = [n for n in fields if theirs.get(n) != ours.get(n)]
    if others:
        raise InputError(
            f"model.{part.name}.{others[0]}={ours.get(others[0])!r} is {theirs.get(others[0])!r} "
            f"in {part.source!r}; leave it as it is there, or take another {part.name}"
        )


def _load_part(part: Part, config: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The part's parameters, by their names in the whole model."""
    _check_part(part, config)
    prefix = f"{part.name}."
    own = {n.removeprefix(prefix): x for n, x in wanted.items() if n.startswith(prefix)}
    source = locate(part.source, f"model.{part.name}")
    found = load_into(source, config, own) if is_published(source) else restore_params(source, own)
    return {f"{prefix}{name}": x for name, x in found.items()}


def generation_of(experiment: Experiment) -> dict[str, Any]:
    """What the model of ``init_from`` says of how it should be sampled, as JSON; {} if nothing."""
    if experiment.init_from is None:
        return {}
    source = locate(experiment.init_from, "init_from")
    if is_published(source):
        return read_generation(source)
    known = has_document(source, GENERATION)
    return read_document(source, GENERATION) if known else {}


def load_base(experiment: Experiment, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the models that ``experiment.init_from`` and its parts name, by name.

    Args:
        experiment: what it begins with; {} if nothing.
        wanted: its parameters, as ``ShapeDtypeStruct`` with shardings; those that the other model
            has are loaded so.

    Raises:
        InputError: there is no such model, it has a retrofit that this experiment lacks, or it has
            other parameters; names the fields of the configuration, or the tensors, that differ.
    """
    base = {} if experiment.init_from is None else _load_model(experiment, wanted)
    for part in experiment.parts:
        base |= _load_part(part, getattr(experiment.model, part.name), wanted)
    return base


def _load_model(experiment: Experiment, wanted: Mapping[str, Any]) -> dict[str, Any]:
    source = locate(experiment.init_from, "init_from")
    if is_published(source):
        names, fields = [], _published_differences(source, experiment)
    else:
        names, fields = _base_names(experiment, source)
    if fields:
        warnings.warn(
            f"init_from={experiment.init_from!r} was trained with another value of "
            f"{'; '.join(fields)}",
            stacklevel=2,
        )
    if is_published(source):
        return load_into(source, experiment.model, wanted)
    return restore_params(source, {name: wanted[name] for name in names})


def _published_differences(source: epath.Path, experiment: Experiment) -> list[str]:
    """Fields of a published model's configuration that this experiment's has otherwise."""
    config, published, _ = read_config(source)
    if family_of(config) != family_of(experiment.model):
        raise InputError(
            f"init_from={experiment.init_from!r} is of the family {family_of(config)!r}, the "
            f"experiment's model is of {family_of(experiment.model)!r}; set model as the "
            "checkpoint has it"
        )
    # Compared as they are published: what else a configuration has is how to run it.
    theirs, ours = (published.config_to(c) for c in (config, experiment.model))
    return [
        f"{name}: {theirs.get(name)} there, {ours.get(name)} here"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]


def _base_names(experiment: Experiment, path: epath.Path) -> tuple[list[str], list[str]]:
    """``(parameters of the source, fields of its configuration that differ)``; all shapes agree."""
    source = read_document(path, "experiment")
    retrofits = retrofits_from_list(source.get("retrofits", []))
    missing = [r for r in retrofits if r not in experiment.retrofits]
    if missing:
        raise InputError(
            f"init_from={str(path)!r} has a model with {missing[0]}, which is not among this "
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
            f"init_from={str(path)!r} holds another model, which differs in {'; '.join(fields)}; "
            "set these fields as that run did"
        )
    return list(shapes[0]), fields
