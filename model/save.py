"""``save``: a model to where the world, or training, reads it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from ..errors import InputError
from ..sharding import path_name
from .checkpoint import CheckpointStore
from .exchange import Lazy
from .fields import float_dtype
from .handle import Model
from .int8 import is_int8
from .published import write_published
from .registry import config_to_dict
from .retrofit import retrofits_to_list
from .storage import absolute
from .unfinished import appearing

FORMATS = ("hf", "orbax")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def save(
    model: Model,
    path: epath.PathLike,
    format: str = "hf",
    *,
    dtype: str | None = None,
    shard_size: str | int = "5GB",
    source: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a model into a new directory, which appears when it is whole.

    Args:
        model: of any family.
        path: the directory; it must not exist, or be empty.
        format: ``"hf"``, the published form, which ``transformers`` loads; or ``"orbax"``, a
            workdir as training leaves it, from which :func:`jaxalope.load` and ``init_from`` read.
        dtype: of the tensors, ``"float32"``, ``"bfloat16"`` or ``"float16"``; as they were read (of
            another model: as they are) if None.
        shard_size: of a safetensors file, such as ``"5GB"``, or bytes.
        source: what the model was read from, as :func:`.unfinished.describe` says it. Whole files
            of the published form that a failure left in ``<path>.partial`` stay there then, and
            another call with the same source and arguments goes on with them; any other, and one to
            a workdir, which Orbax writes in one go, begins anew. If None, nothing is left.
        progress: called with a number of bytes whenever as many have been written.

    Raises:
        InputError: a model or an argument that does not go together with the format, or a directory
            that is there already.
        SaveError: the disk is full, or cannot be written to; nothing stands under ``path``.
    """
    dtype = float_dtype("dtype", dtype)
    if format not in FORMATS:
        raise InputError(f"format={format!r} is not one of {FORMATS}")
    if jax.process_count() > 1 and format == "hf":
        raise InputError(
            "format='hf' is written by one process; save with format='orbax' here and convert that "
            "on one machine: python -m jaxalope.model.convert"
        )
    size = num_bytes(shard_size)
    path = absolute(path)
    tag = None
    if source is not None and format == "hf":
        tag = {"source": source, "format": format, "dtype": dtype, "shard_size": size}
    with appearing(path, tag) as directory:
        if format == "hf":
            write_published(directory, model, shard_size=size, dtype=dtype, progress=progress)
        else:
            _write_workdir(directory, model, dtype, progress)


def num_bytes(size: str | int) -> int:
    """``"5GB"`` as a number of bytes.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", str(size).upper())
    number = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if number < 1:
        raise InputError(f"shard_size={size!r} is no size; write it like '5GB'")
    return number


def _write_workdir(
    directory: epath.Path,
    model: Model,
    dtype: str | None,
    progress: Callable[[int], None] | None,
) -> None:
    params: Any = jax.tree.map(lambda x: x.load() if isinstance(x, Lazy) else x, model.params)
    model = dataclasses.replace(model, params=params)
    if dtype is not None:
        params = jax.tree.map_with_path(
            lambda path, x: x if is_int8(path_name(path), x) else x.astype(dtype), params
        )
    documents = {
        "experiment": {
            "model": config_to_dict(model.config),
            "retrofits": retrofits_to_list(model.module()),
            "data": {"add_bos": model.add_bos},
        },
        "generation": model.defaults.to_json(),
    }
    if model.origin is not None:
        documents["origin"] = model.origin.to_json()
    files = {}
    if model.tokenizer is not None:
        saved = model.tokenizer.saved_files()
        files = {f"tokenizer/{name}": content for name, content in saved.items()}
    with CheckpointStore(directory / "checkpoints") as store:
        store.save(0, {"params": params}, documents, files=files)
    if progress is not None:
        progress(sum(x.nbytes for x in jax.tree.leaves(params)))
