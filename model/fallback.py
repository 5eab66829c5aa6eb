"""Which checkpoint is read: the newest that can be, where damage is told from what only hinders.

Orbax wraps whatever goes wrong in errors of its own, which say that a tree does not fit its
handler; the reason is in what caused them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from etils import epath

from ..errors import InputError, ReadError
from .step_folders import MARKER, exists, first_line, list_steps
from .storage import causes, is_remote, is_transient

# By kind: the error, TensorStore's or XLA's word for it, and the way past it.
_HINDRANCES = (
    (MemoryError, "RESOURCE_EXHAUSTED", "Free memory, or use more or larger devices"),
    (PermissionError, "PERMISSION_DENIED", "Let this user read it"),
)


def newest_readable(
    directory: epath.Path, step: int | None, read: Callable[[epath.Path], Any]
) -> tuple[Any, list[int]]:
    """``(read(checkpoint), unreadable newer steps)`` for the newest checkpoint that can be read.

    Args:
        directory: of the numbered steps.
        step: this one and no other; the newest if None.
        read: takes the folder of a step, and raises if it is damaged.

    Raises:
        InputError: no checkpoint, none readable, or ``read`` raised it.
        ReadError: memory, permission or the storage failed, which says nothing about the files.
    """
    # Numbers without the marker count: a newest checkpoint that lost a file must not pass unseen.
    candidates = list_steps(directory, complete=False)[::-1] if step is None else [step]
    if not candidates:
        raise InputError(f"no checkpoint in {directory}; train there first, or check the path")
    failures: dict[int, str] = {}
    for candidate in candidates:
        at = directory / str(candidate)
        try:
            if not exists(at / MARKER):
                raise FileNotFoundError(f"{at / MARKER} is missing")
            result = read(at)
        except InputError:
            raise
        except Exception as error:
            hindrance = _hindrance(error, at)
            if hindrance is not None:
                reason, remedy = hindrance
                raise ReadError(
                    f"the checkpoint of step {candidate} in {directory} could not be read this "
                    f"time: {_words(reason)}. It may well be whole, and nothing was renamed. "
                    f"{remedy}"
                ) from error
            failures[candidate] = _words(_innermost(error))
            continue
        for bad, reason in failures.items():
            warnings.warn(
                f"the checkpoint of step {bad} in {directory} cannot be read ({reason}); using "
                f"that of step {candidate} instead",
                stacklevel=3,
            )
        return result, list(failures)
    reasons = "; ".join(f"step {s}: {reason}" for s, reason in failures.items())
    others = f" (there are {list_steps(directory)})" if step is not None else ""
    raise InputError(f"no readable checkpoint in {directory}{others}: {reasons}")


def _hindrance(error: Exception, at: epath.Path) -> tuple[BaseException, str] | None:
    """What says nothing about the files, and what helps; None: they are damaged."""
    for cause in (*causes(error), *_closed_folder(at)):
        for kind, words, remedy in _HINDRANCES:
            if isinstance(cause, kind) or words in str(cause):
                return cause, f"{remedy}, and try again"
    if not is_transient(error):
        return None
    return _innermost(error), (
        f"Try again; if that does not help, name another one (step=...), or move {at} away"
    )


def _closed_folder(at: epath.Path) -> list[PermissionError]:
    """A folder that may not be looked into: for Orbax, what it holds is missing."""
    try:
        for path in () if is_remote(at) else at.iterdir():
            if path.is_dir():
                next(path.iterdir(), None)
    except PermissionError as error:
        return [error]
    except OSError:
        pass
    return []


def _innermost(error: BaseException) -> BaseException:
    *_, innermost = causes(error)
    return innermost


def _words(error: BaseException) -> str:
    text = first_line(error).rstrip(".")
    # Alone, a missing key or an empty text says little.
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
