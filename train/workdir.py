"""The folder of a run: whose it is, and what lies in it beside checkpoints and metrics."""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from ..configs.experiment import Experiment, diff, experiment_from_dict, experiment_to_dict
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..errors import InputError
from ..model.storage import is_transient

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

EXPERIMENT = "experiment.json"
TOKENIZER = "tokenizer"
GENERATION = "generation"
CHECKPOINTS = "checkpoints"

# What may differ when a run goes on; a name stands for itself and everything below it. The shapes
# in a checkpoint depend on none of it.
MAY_CHANGE = (
    # Deliberate changes of what is computed from there on: the ways past a step that is not finite
    # or a document that cannot be read, and a longer run, whose schedule ends later.
    "schedule",
    "train.clip_norm",
    "train.skip_steps",
    "data.sources.skip_bad",  # of any source
    "data.eval_sources.skip_bad",
    "train.steps",  # upward only
    # No change of what is computed, beyond rounding.
    "train.accumulation",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.profile_steps",
    "checkpoint",
    "mesh",
    "rules",
    "data.prefetch_batches",
    "data.read_threads",
    "objective.max_logits",
    "model.remat",
)


def open_workdir(
    workdir: epath.PathLike, experiment: Experiment
) -> tuple[epath.Path, Tokenizer, list[str]]:
    """Make the folder this experiment's, or see that it is.

    Writes ``experiment.json`` and ``tokenizer/``. A folder that has a tokenizer keeps it: the run
    goes on with the very one it began with. A folder of a run that ended before it saved anything
    is any experiment's.

    Returns:
        ``(folder, tokenizer, notes)``; ``notes`` are lines on what differs from the last run.

    Raises:
        InputError: it belongs to another experiment; names every field that differs.
    """
    workdir = epath.Path(workdir).expanduser()
    saved, source = workdir / TOKENIZER, experiment.data.tokenizer
    folder = (
        f"workdir={str(workdir)!r} cannot be used as a folder",
        "Name another one, or make it one that this user can write",
    )
    with _or_wrong(*folder):
        before, notes = _check_owner(workdir, experiment)
        keep = saved.exists() and (before is None or before.data.tokenizer == source)
        if keep:
            tokenizer = load_tokenizer(saved)
    if not keep:
        with _or_wrong(f"data.tokenizer={source!r} cannot be read", "Name another one"):
            tokenizer = load_tokenizer(source)
    check_vocabulary(experiment, tokenizer)
    with _or_wrong(*folder):
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            if before is not None:
                _remove_traces(workdir, tokenizer=not keep)
            # A kill after this line: the next start sees whose folder it is, and no tokenizer.
            _replace(workdir / EXPERIMENT, json.dumps(experiment_to_dict(experiment), indent=1))
            if not keep:
                _save_tokenizer(tokenizer, saved)
    return workdir, tokenizer, notes


@contextlib.contextmanager
def _or_wrong(what: str, remedy: str) -> Iterator[None]:
    """What the system has against a path, as an :class:`InputError`.

    Not a full disk, nor a storage that fails for the moment: they say nothing about the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL or is_transient(error):
            raise
        raise InputError(f"{what}: {error}. {remedy}") from error


def check_vocabulary(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Raise an :class:`InputError` if the tokenizer has ids that the model has no row for."""
    rows = experiment.model.vocab_size
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"data.tokenizer={experiment.data.tokenizer!r} has {tokenizer.vocab_size} ids, and "
            f"model.vocab_size={rows} has no room for them; set model.vocab_size="
            f"{tokenizer.vocab_size} or more"
        )


def tokenizer_files(workdir: epath.Path) -> dict[str, bytes]:
    """The tokenizer's files, by the path at which a checkpoint keeps a copy."""
    saved = workdir / TOKENIZER
    paths = (path for level in ("*", "*/*") for path in saved.glob(level) if path.is_file())
    return {f"{TOKENIZER}/{path.relative_to(saved)}": path.read_bytes() for path in paths}


def generation_defaults(workdir: epath.Path, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """How the run's model should be sampled: as ``find()`` says when the run begins.

    Kept in ``generation.json``, since where it came from may be gone when the run goes on.
    """
    path = workdir / f"{GENERATION}.json"
    if not path.exists():
        found = find()
        if jax.process_index() == 0:
            _replace(path, json.dumps(found, indent=1))
        return found
    return json.loads(path.read_text())


def may_change(path: str) -> bool:
    """Whether a run may go on with another value of this field."""
    path = re.sub(r"\.\d+\b", "", path)  # Which source, where a field is one of several.
    return any(path == name or path.startswith(f"{name}.") for name in MAY_CHANGE)


def _check_owner(
    workdir: epath.Path, experiment: Experiment
) -> tuple[Experiment | None, list[str]]:
    """``(the experiment to take the folder from, if there is one, lines for the console)``."""
    path = workdir / EXPERIMENT
    if not path.exists():
        if (workdir / CHECKPOINTS).exists():
            raise InputError(
                f"workdir={str(workdir)!r} has checkpoints but no {EXPERIMENT}; copy the one of a "
                "checkpoint (checkpoints/<step>/documents/experiment.json) there, or use another "
                "workdir"
            )
        return None, []
    try:
        before = experiment_from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(
            f"{path} cannot be read ({error}); put back the copy that every checkpoint has "
            "(checkpoints/<step>/documents/experiment.json), or use another workdir"
        ) from error
    changes = diff(before, experiment)
    other = [change for change in changes if not may_change(_field(change))]
    if experiment.train.steps < before.train.steps:
        other += [change for change in changes if _field(change) == "train.steps"]
    if other and not _has_saved(workdir):
        return before, [
            f"{workdir} is this experiment's from now on; the one before it saved nothing, and "
            f"differs in {'; '.join(other)}"
        ]
    if other:
        raise InputError(
            f"workdir={str(workdir)!r} belongs to another experiment, which differs in "
            f"{'; '.join(other)}. Use another workdir, or set these fields back"
        )
    return None, [f"changed since the last run: {change}" for change in changes]


def _has_saved(workdir: epath.Path) -> bool:
    """Whether a save was begun: also what is unfinished, damaged or set aside is somebody's."""
    checkpoints = workdir / CHECKPOINTS
    return checkpoints.exists() and next(iter(checkpoints.iterdir()), None) is not None


def _field(change: str) -> str:
    return change.partition(":")[0]


def _remove_traces(workdir: epath.Path, *, tokenizer: bool) -> None:
    """Remove what would be taken for this run's, and is that of the experiment before."""
    (workdir / f"{GENERATION}.json").unlink(missing_ok=True)
    saved = workdir / TOKENIZER
    if tokenizer and saved.exists():
        saved.rename(_empty_part(saved)).rmtree()


def _save_tokenizer(tokenizer: Any, directory: epath.Path) -> None:
    # Whole or not at all: a folder that a kill left half written would be believed.
    part = _empty_part(directory)
    tokenizer.save(part)
    part.rename(directory)


def _empty_part(directory: epath.Path) -> epath.Path:
    part = directory.parent / f"{directory.name}.part"
    if part.exists():
        part.rmtree()
    return part


def _replace(path: epath.Path, text: str) -> None:
    part = path.parent / f"{path.name}.part"
    part.write_text(text + "\n")
    part.replace(path)
