"""Checkpoints on disk: a directory of numbered steps, written by Orbax and readable by eye.

The one file that imports Orbax. A step is a directory::

    <directory>/<step>/
      params/ optimizer/ ema/     one Orbax tree each: flat, keyed by the path of every leaf
      documents/checkpoint.json   format, step, metric, number of processes, saved trees
      documents/<name>.json       what the writer gave: experiment, ...
      documents/<name>.<p>.json   what each process gave: its data streams, ...
      documents/<file>            files, copied byte for byte: the tokenizer's, ...

A tree is stored flat under the names that users see (``stack.body.0.mixer.q_proj.kernel``); the
caller's abstract tree gives structure, dtypes and placement back. So integer keys, optimizer
namedtuples and other meshes need no care, and a reader can take ``params`` alone.

What lies there of steps that are unfinished, damaged or half deleted: :mod:`.step_folders`. Which
one is read: :mod:`.fallback`. Why it is built so: ``docs/decisions/0003-checkpoints.md``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from ..errors import InputError, SaveError
from .fallback import newest_readable
from .step_folders import (
    exists,
    first_line,
    list_steps,
    remove,
    remove_leftovers,
    remove_unfinished,
    saving_note,
    set_aside,
)
from .storage import absolute

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:
    from orbax.checkpoint.experimental import v1 as ocp

FORMAT = 1
_DISK_FULL = ("no space left", "quota exceeded", "file too large")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What :meth:`CheckpointStore.restore` read.

    ``process_documents[name][p]`` is what process ``p`` of the writing run saved; that run may have
    had another number of processes than this one.
    """

    step: int
    trees: dict[str, Any]
    documents: dict[str, Any]
    process_documents: dict[str, list[Any]]


class CheckpointStore:
    """The checkpoints of one run: saves in the background, keeps the last and the best ones.

    One writer a directory. With several processes every one calls the same methods in the same
    order; process 0 does the renaming and deleting.

    Args:
        directory: where the numbered steps lie; local, or any path that ``etils.epath`` opens.
        keep_last: how many of the newest checkpoints stay (at least 1).
        keep_best: how many of those with the lowest metric stay beside them.
    """

    def __init__(self, directory: epath.PathLike, *, keep_last: int = 3, keep_best: int = 1):
        if keep_last < 1:
            raise InputError(f"checkpoint.keep_last={keep_last}: keep at least 1")
        if keep_best < 0:
            raise InputError(f"checkpoint.keep_best={keep_best}: give 0 or more")
        self.directory = absolute(directory)
        self._keep_last, self._keep_best = keep_last, keep_best
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        try:
            if jax.process_index() == 0:
                remove_leftovers(self.directory)
        finally:
            _wait_for_all("checkpoint leftovers")

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return list_steps(self.directory)

    def has_any(self) -> bool:
        """Whether there is a checkpoint at all, be it a damaged one (not an unfinished one)."""
        return bool(list_steps(self.directory, complete=False))

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        documents: Mapping[str, Any],
        *,
        process_documents: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        metric: float | None = None,
    ) -> bool:
        """Start saving ``step``; returns once the arrays are copied, so that they may be donated.

        Waits for the save before it. The new checkpoint becomes visible when all of it is written,
        and only then are older ones deleted.

        Args:
            step: its number; a step that is there already is left as it is.
            trees: pytrees of arrays, by name.
            documents: JSON-able values, by name.
            process_documents: the same, of this process alone.
            files: contents by path relative to ``documents/``.
            metric: lower is better; checkpoints without one (or not finite) are never "best".

        Returns:
            False if the step was there already.

        Raises:
            SaveError: this save or the one before it failed.
        """
        self.wait()
        try:
            if step in self.steps():
                return False
        except OSError as error:
            raise self._failed(step, error) from error
        flat = {name: _flatten(tree) for name, tree in trees.items()}
        header = {
            "format": FORMAT,
            "step": step,
            "metric": metric if metric is not None and math.isfinite(metric) else None,
            "processes": jax.process_count(),
            "process_documents": sorted(process_documents or {}),
            "documents": sorted(documents),
            "trees": {
                tree: {name: [str(x.dtype), list(x.shape)] for name, x in leaves.items()}
                for tree, leaves in flat.items()
            },
        }
        writer = _Documents(
            {**documents, "checkpoint": header}, process_documents or {}, files or {}
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0 and not exists(self.directory / str(step)):
                saving_note(self.directory, step).write_text("")
            with _context():
                response = ocp.save_checkpointables_async(
                    self.directory / str(step), {**_filled(flat), "documents": writer}
                )
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = self._executor.submit(self._finish, step, response)
        return True

    def check(self) -> None:
        """Raise the error of a finished save, without waiting for one that is under way."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            SaveError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, trees: Mapping[str, Any], step: int | None = None) -> Restored:
        """Read a checkpoint: the newest that is readable, or ``step`` and no other.

        An unreadable checkpoint is named in a warning and renamed to ``<step>.unreadable``, and the
        one before it is read.

        Args:
            trees: for each tree wanted, its abstract form: ``ShapeDtypeStruct`` leaves, whose
                shardings (the default device where there is none) say where arrays go. They need
                not be those of the run that saved.
            step: which checkpoint; the newest if None.

        Raises:
            InputError: no checkpoint, none readable, or a tree whose names or shapes are others.
            ReadError: memory, permission or the storage failed, which says nothing about the
                checkpoint; nothing is renamed.
        """
        self.wait()
        restored, damaged = _read_newest(self.directory, trees, step)
        if jax.process_index() == 0:
            for bad in damaged:
                set_aside(self.directory / str(bad))
        return restored

    def close(self) -> None:
        """Wait for the save under way and stop the background thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _finish(self, step: int, response: Any) -> None:
        try:
            response.result()
        except Exception as error:
            raise self._failed(step, error) from error
        if jax.process_index() != 0:
            return
        try:
            saving_note(self.directory, step).unlink(missing_ok=True)
            self._prune()
        except Exception as error:  # The step is saved: what is left over waits for the next one.
            warnings.warn(
                f"old checkpoints in {self.directory} were not cleared: {first_line(error)}",
                stacklevel=2,
            )

    def _failed(self, step: int, error: Exception) -> SaveError:
        kept = "earlier ones are untouched"
        with contextlib.suppress(OSError):  # The storage that failed may fail again.
            if jax.process_index() == 0:
                remove_unfinished(self.directory, step)
            steps = self.steps()
            kept = f"the last good one is step {steps[-1]}" if steps else "there is no earlier one"
        reason = first_line(error)
        full = any(words in str(error).lower() for words in _DISK_FULL)
        remedy = "Free space there (or keep fewer)" if full else "Make that path writable"
        return SaveError(
            f"checkpoint of step {step} could not be saved in {self.directory}: {reason}; {kept}. "
            f"{remedy}, and run the same command again"
        )

    def _prune(self) -> None:
        steps = self.steps()
        metrics = {s: _metric(self.directory / str(s)) for s in steps}
        best = sorted((m, -s) for s, m in metrics.items() if m is not None)[: self._keep_best]
        keep = {*steps[-self._keep_last :], *(-s for _, s in best)}
        for step in steps:
            if step not in keep:
                remove(self.directory / str(step))


def restore_params(
    path: epath.PathLike,
    abstract_params: Any,
    *,
    step: int | None = None,
    ema: bool = False,
    partial: bool = False,
) -> Any:
    """The parameters of a checkpoint, placed as ``abstract_params`` says.

    Args:
        path: a work directory, its ``checkpoints/``, or one checkpoint in there.
        abstract_params: a pytree of ``ShapeDtypeStruct``; stored values are cast to its dtypes and
            laid out by its shardings (the default device where there is none).
        step: which checkpoint; the newest readable one if None.
        ema: the moving average of the parameters, where the run kept one.
        partial: leave alone parameters of the checkpoint that are not asked for.

    Raises:
        InputError: no such checkpoint, none readable, or parameters of another model.
        ReadError: memory, permission or the storage failed, which says nothing about it.
    """
    directory, step = _locate(path, step)
    name = "ema" if ema else "params"
    return _read_newest(directory, {name: abstract_params}, step, partial)[0].trees[name]


def read_document(path: epath.PathLike, name: str, step: int | None = None) -> Any:
    """The JSON document ``name`` of a checkpoint (arguments as in :func:`restore_params`)."""
    directory, step = _locate(path, step)
    return newest_readable(directory, step, lambda at: _read_json(at, name))[0]


def has_document(path: epath.PathLike, name: str, step: int | None = None) -> bool:
    """Whether a checkpoint has the JSON document ``name``."""
    return (document_dir(path, step) / f"{name}.json").exists()


def document_dir(path: epath.PathLike, step: int | None = None) -> epath.Path:
    """Where a checkpoint's documents and files lie (arguments as in :func:`restore_params`)."""
    directory, step = _locate(path, step)

    def read(at: epath.Path) -> epath.Path:
        _read_json(at, "checkpoint")
        return at / "documents"

    return newest_readable(directory, step, read)[0]


class _Documents:
    """Writes the small files of a checkpoint (Orbax's ``StatefulCheckpointable``)."""

    def __init__(self, shared: Mapping, own: Mapping, files: Mapping[str, bytes]):
        process = jax.process_index()
        self._files = {f"{name}.{process}.json": _to_json(value) for name, value in own.items()}
        if process == 0:
            self._files |= {f"{name}.json": _to_json(value) for name, value in shared.items()}
            self._files |= files

    async def save(self, directory):
        async def write():
            root = await directory.await_creation()
            for name, content in self._files.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

        return write()

    async def load(self, directory):
        raise NotImplementedError("documents are read as files")


def _context() -> ocp.Context:
    # Where directories are made in the background, a full disk is only noticed by a timeout of
    # five minutes in the threads that wait for them.
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _read_json(checkpoint: epath.Path, name: str) -> Any:
    return json.loads((checkpoint / "documents" / f"{name}.json").read_text())


def _wait_for_all(name: str) -> None:
    """Every process waits here for the others."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _locate(path: epath.PathLike, step: int | None) -> tuple[epath.Path, int | None]:
    """``(directory of checkpoints, step)`` for a work directory or anything below it."""
    path = absolute(path)
    if (path / "documents").exists() and path.name.isdigit():
        if step not in (None, int(path.name)):
            raise InputError(f"{path} is the checkpoint of one step; step={step} is another")
        return path.parent, int(path.name)
    return (path / "checkpoints" if (path / "checkpoints").exists() else path), step


def _read_newest(
    directory: epath.Path, trees: Mapping[str, Any], step: int | None, partial: bool = False
) -> tuple[Restored, list[int]]:
    return newest_readable(directory, step, lambda at: _read(at, trees, partial))


def _read(at: epath.Path, trees: Mapping[str, Any], partial: bool) -> Restored:
    header = _read_json(at, "checkpoint")
    if header["format"] > FORMAT:
        raise InputError(
            f"{at} has checkpoint format {header['format']}, this version reads up to {FORMAT}; "
            "upgrade jaxalope"
        )
    flat = {name: _flatten(tree) for name, tree in trees.items()}
    for name, leaves in flat.items():
        _check_names(at, name, leaves, header["trees"], partial)
    abstract = {n: {k: _placed(x) for k, x in leaves.items()} for n, leaves in flat.items()}
    abstract = _filled(abstract)
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
        loaded = ocp.load_checkpointables(at, abstract) if abstract else {}
    return Restored(
        step=header["step"],
        trees={
            name: jax.tree.unflatten(
                jax.tree.structure(tree), [loaded[name][key] for key in flat[name]]
            )
            for name, tree in trees.items()
        },
        documents={name: _read_json(at, name) for name in header["documents"]},
        process_documents={
            name: [_read_json(at, f"{name}.{p}") for p in range(header["processes"])]
            for name in header["process_documents"]
        },
    )


def _check_names(
    at: epath.Path, tree: str, wanted: Mapping[str, Any], stored: Mapping, partial: bool
) -> None:
    if tree not in stored:
        raise InputError(f"{at} holds {sorted(stored)}, not {tree!r}")
    shapes = {name: tuple(shape) for name, (_, shape) in stored[tree].items()}
    wrong = [
        f"{name}: the checkpoint has {shapes.get(name, 'no such tensor')}, "
        f"the model {tuple(wanted[name].shape) if name in wanted else 'no such tensor'}"
        for name in sorted(wanted.keys() if partial else shapes.keys() | wanted.keys())
        if name not in wanted or shapes.get(name) != tuple(wanted[name].shape)
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise InputError(f"{tree!r} in {at} is of another model: {'; '.join(wrong[:3])}{more}")


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in the order of ``jax.tree.leaves``."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = ".".join(_key(entry) for entry in path) or "value"
        if name in flat:
            raise ValueError(f"two leaves of one tree are both called {name!r}")
        flat[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return flat


def _filled(trees: Mapping[str, dict]) -> dict[str, dict]:
    """Orbax has no form for a tree without leaves; the caller's own structure says it all."""
    return {name: leaves for name, leaves in trees.items() if leaves}


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _placed(x: Any) -> jax.ShapeDtypeStruct:
    place = getattr(x, "sharding", None)
    if place is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _metric(checkpoint: epath.Path) -> float | None:
    try:
        return _read_json(checkpoint, "checkpoint")["metric"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
