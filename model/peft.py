"""Adapters as PEFT has them: ``adapter_config.json`` and ``adapter_model.safetensors``.

The names are those of the family's table (:mod:`.exchange.table`) for the kernels that the adapters
stand beside, so a family with a table has this without a line of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save as format_tensors

from ..errors import InputError
from ..sharding import abstract, path_name, split
from .exchange import check_types, layout_of_model, read_header, read_object
from .exchange.layouts import Layout
from .handle import Model
from .lora import LoRAConfig, adapted
from .registry import FAMILIES, build_model, family_of
from .retrofit import add_retrofits
from .targets import linears

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Options of PEFT that change the computation, and the one value each has here; written as well.
_FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# More of them, off where they are absent; not written, as an older PEFT does not know every one.
_OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Numbers that say what the tensors are.
_NUMBERS = {"r": int, "lora_alpha": float}
# Draws of a fresh adapter that leave the base as it is. The others (pissa, olora, corda, loftq,
# lora_ga) take from the base what they put into the adapter: it is of another base than is here.
_DRAWS = (None, True, False, "gaussian", "eva", "mica", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Place:
    """One published map, and the linear map of ours (at one repeat of a scan) that it is."""

    name: str  # published, without ``.weight``
    path: str  # of our linear map
    at: tuple[int, ...]
    layout: Layout  # of the kernel

    def matrices(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(A [rank, in], B [out, rank])`` of our ``a [*in, rank]`` and ``b [rank, *out]``."""
        (produced, contracted), ours = self.layout.published, self.layout.ours
        num_in = a.ndim - 1
        first = [ours.index(axis.name) for axis in contracted]
        second = [ours.index(axis.name) - num_in + 1 for axis in produced]
        flat_a = a.transpose(*first, num_in).reshape(-1, a.shape[-1])
        return flat_a.T, b.transpose(*second, 0).reshape(-1, b.shape[0])

    def arrays(self, a, b, shape_a, shape_b) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of :meth:`matrices`; ``shape_a`` and ``shape_b`` are of our arrays."""
        (produced, contracted), ours = self.layout.published, self.layout.ours
        num_in = len(shape_a) - 1
        first = [ours.index(axis.name) for axis in contracted]
        second = [ours.index(axis.name) - num_in for axis in produced]
        flat_a = a.T.reshape(*(shape_a[i] for i in first), shape_a[-1])
        flat_b = b.T.reshape(shape_b[0], *(shape_b[1 + i] for i in second))
        return (
            flat_a.transpose(*np.argsort(first), num_in),
            flat_b.transpose(0, *(1 + np.argsort(second))),
        )


def save_lora(model: Model, path: epath.PathLike, base: str | None = None) -> None:
    """Write a model's adapters, and nothing else of it, as PEFT reads them.

    Args:
        model: with adapters, of a family that is published.
        path: a directory; made if it is not there.
        base: hub id or path of the base, remembered in ``adapter_config.json``.

    Raises:
        InputError: there are no adapters, or one stands on a part of a published map (GPT-NeoX'
            query, key and value): fold those in by ``merge_lora``.
    """
    found = adapted(model.module())
    if not found:
        raise InputError("save_lora: the model has no adapters; attach them with LoRAConfig")
    config = next(r for r in model.module().retrofits if r.kind == LoRAConfig.kind)
    tensors, names = {}, []
    for place in _places(model):
        if place.path in found:
            lora = found[place.path].lora
            a, b = (np.asarray(x[...][place.at], np.float32) for x in (lora.a, lora.b))
            a, b = place.matrices(a, b)
            names.append(place.name)
            tensors[f"{_PREFIX}{place.name}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{_PREFIX}{place.name}.lora_B.weight"] = np.ascontiguousarray(b)
    contents = {
        **_FIXED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": names,
        "inference_mode": True,
    }
    directory = epath.Path(path).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS).write_bytes(format_tensors(tensors, {"format": "pt"}))
    (directory / CONFIG).write_text(json.dumps(contents, indent=2) + "\n")


def load_lora(model: Model, path: epath.PathLike) -> Model:
    """``model`` with the adapters of a PEFT directory; its own arrays are shared.

    Raises:
        InputError: a file is missing or damaged, an option changes the computation and is not here,
            or a tensor has no place in this model.
    """
    directory = epath.Path(path).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).exists():
            raise InputError(f"adapter={str(path)!r}: there is no {name}")
    contents = read_object(directory / CONFIG)
    for name in _NUMBERS:
        if name not in contents:
            raise InputError(f"{directory / CONFIG} has no {name}; fetch it again")
    check_types(contents, _NUMBERS, directory / CONFIG)
    _check_computation(directory / CONFIG, contents)
    tensors = {name: stored.read() for name, stored in read_header(directory / WEIGHTS).items()}
    places = {place.name: place for place in _places(model)}
    found: dict[str, list[tuple[_Place, np.ndarray, np.ndarray]]] = {}
    for name in tensors:
        stem = re.fullmatch(re.escape(_PREFIX) + r"(.*)\.lora_[AB]\.weight", name)
        pair = [f"{_PREFIX}{stem[1]}.lora_{x}.weight" for x in "AB"] if stem else []
        if not stem or stem[1] not in places or not all(x in tensors for x in pair):
            near = ", ".join(list(places)[:3])
            raise InputError(
                f"{directory / WEIGHTS}: {name} has no place in this model, or lacks its other "
                f"half; maps that can be adapted are called, for example, {near}"
            )
        if name == pair[0]:
            place = places[stem[1]]
            found.setdefault(place.path, []).append((place, *(tensors[x] for x in pair)))
    if not found:
        raise InputError(f"{directory / WEIGHTS}: there are no adapters in it")
    config = LoRAConfig(
        rank=contents["r"],
        alpha=float(contents["lora_alpha"]),
        targets=tuple(f"^{re.escape(p)}$" for p in sorted(found)),
    )
    adapted_model = add_retrofits(model, [config], jax.random.key(0))
    module = adapted_model.module()
    for where, parts in found.items():
        lora = linears(module)[where].lora
        # A repeat of a scan that the file does not speak of is not adapted.
        a, b = (np.zeros(x.shape, np.float32) for x in (lora.a, lora.b))
        for place, *pair in parts:
            shapes = a[place.at].shape, b[place.at].shape
            for x, tensor, shape in zip("AB", pair, shapes, strict=True):
                if tensor.size != math.prod(shape):
                    raise InputError(
                        f"{directory / WEIGHTS}: lora_{x} of {place.name} has shape "
                        f"{tensor.shape}, which does not fit rank {config.rank} and {where}"
                    )
            a[place.at], b[place.at] = place.arrays(*pair, *shapes)
        for param, value in ((lora.a, a), (lora.b, b)):
            param[...] = jax.device_put(jnp.asarray(value), param[...].sharding)
    graphdef, params = split(module)
    return dataclasses.replace(adapted_model, graphdef=graphdef, params=params)


def _check_computation(file: epath.Path, contents: Mapping[str, Any]) -> None:
    """Raise if an ``adapter_config.json`` means another computation than the one here."""
    for name, value in {**_FIXED, **dict.fromkeys(_OFF)}.items():
        # PEFT writes an option that is off as null, false, or an empty list or dictionary.
        if (contents.get(name) or None) != (value or None):
            raise _other_computation(file, name, contents.get(name), repr(value))
    draw = contents.get("init_lora_weights")
    if (draw.lower() if isinstance(draw, str) else draw) not in _DRAWS:
        raise _other_computation(
            file, "init_lora_weights", draw, "an adapter beside the base as it was published"
        )


def _other_computation(file: epath.Path, name: str, value: Any, ours: str) -> InputError:
    return InputError(
        f"{file}: {name}={value!r} is another computation than the one here, {ours}; merge the "
        "adapter with PEFT and load the result"
    )


def _places(model: Model) -> Iterator[_Place]:
    """The published maps that are linear maps of the model.

    Raises:
        InputError: the family is not published, or an adapted map is a part of a published one.
    """
    family = FAMILIES[family_of(model.config)]
    if family.published is None:
        raise InputError(
            f"models of the family {family_of(model.config)!r} have no published form; save with "
            "format='orbax'"
        )
    # The base alone: adapters and scales are in no table.
    _, shapes, _ = abstract(lambda key: build_model(model.config, key))
    found = linears(model.module())
    for leaf in layout_of_model(family.published, model.config, shapes):
        path = path_name(leaf.path[:-1])
        linear = found.get(path)
        if linear is None or leaf.path[-1] != "kernel":
            continue
        for piece in leaf.pieces:
            axes = [axis for group in piece.layout.published for axis in group]
            whole = len(piece.layout.published) == 2 and all(axis.name for axis in axes)
            if whole:
                yield _Place(piece.name.removesuffix(".weight"), path, piece.at, piece.layout)
            elif getattr(linear, "lora", None) is not None:
                raise InputError(
                    f"{path} is a part of the published {piece.name}, which an adapter of this "
                    "rank cannot be; merge_lora and save the model, or adapt other targets"
                )
