"""The folders of numbered steps: which of them are whole, and clearing away those that are not.

Orbax gives a step another name until it is whole, and then renames it to its number. On ``gs://``
it cannot rename, and writes under the number from the start. So we keep a note, ``<step>.saving``,
beside a step until it is whole; and on every file system a step is

- *unfinished*: a name of Orbax's for what is not done, or a note and no marker. It is deleted.
- *damaged*: a number without a marker and without a note. It is kept, and set aside when read.
- *half deleted*: the same, older than a whole step (deleting removes the marker first). It is
  deleted.
"""

from __future__ import annotations

import time
import warnings

from etils import epath

from ..errors import ReadError
from .storage import is_remote

MARKER = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"
_SAVING = ".saving"
_UNREADABLE = ".unreadable"
# On gs:// Orbax writes this after the marker, last of all.
_COMMITTED = "commit_success.txt"


def list_steps(directory: epath.Path, complete: bool = True) -> list[int]:
    """The steps there, ascending; unless ``complete``, damaged ones too, but no unfinished one.

    Raises:
        ReadError: this user may not look into one of the folders.
    """
    try:
        names = {path.name for path in directory.iterdir()} if exists(directory) else set()
        steps = []
        for name in filter(str.isdigit, names):
            saving = f"{name}{_SAVING}" in names
            if _is_whole(directory, int(name), saving=saving) or not (complete or saving):
                steps.append(int(name))
    except PermissionError as error:
        raise ReadError(
            f"the checkpoints in {directory} could not be listed: {first_line(error)}. Let this "
            "user read them, and try again"
        ) from error
    return sorted(steps)


def _is_whole(directory: epath.Path, step: int, *, saving: bool) -> bool:
    """Whether all of a step was written; ``saving`` says that its note is still there."""
    at = directory / str(step)
    if not exists(at / MARKER):
        return False
    return not (saving and str(at).startswith("gs://")) or exists(at / _COMMITTED)


def saving_note(directory: epath.Path, step: int) -> epath.Path:
    """The file that stands there while a step is being saved."""
    return directory / f"{step}{_SAVING}"


def remove_unfinished(directory: epath.Path, step: int) -> None:
    """Delete what a save of ``step`` that failed or was cut off has written, then its note."""
    for partial in directory.glob(f"{step}{_UNFINISHED}*"):
        remove(partial)
    if not exists(saving_note(directory, step)):
        return
    at = directory / str(step)
    if exists(at) and not _is_whole(directory, step, saving=True):
        remove(at)
        if exists(at):  # A warning has said so; with its note it is not taken for a damaged one.
            return
    saving_note(directory, step).unlink(missing_ok=True)


def remove_leftovers(directory: epath.Path) -> None:
    """Clear what a killed run left: unfinished saves, and old steps that it was deleting."""
    if not exists(directory):
        return
    for note in list(directory.glob(f"*{_SAVING}")):
        step = note.name.removesuffix(_SAVING)
        if step.isdigit():
            remove_unfinished(directory, int(step))
    steps = list_steps(directory)
    for path in directory.iterdir():
        deleting = path.name.isdigit() and steps and int(path.name) < steps[-1]
        if _UNFINISHED in path.name or (deleting and int(path.name) not in steps):
            remove(path)


def exists(path: epath.Path) -> bool:
    """As ``path.exists()``, which on a local disk takes every error for absence."""
    if is_remote(path):
        return path.exists()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove(path: epath.Path, attempts: int = 20) -> None:
    """Delete a checkpoint so that it is never visible in part; a failure only costs space."""
    for attempt in range(1, attempts + 1):
        try:
            (path / MARKER).unlink(missing_ok=True)
            path.rmtree()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            # Threads of a save that failed may still be writing: their folder is not empty yet.
            if attempt == attempts:
                warnings.warn(f"cannot delete {path}: {first_line(error)}", stacklevel=2)
            time.sleep(0.05)


def set_aside(path: epath.Path) -> None:
    """Rename a damaged step, so that its number is free and its files are not lost."""
    taken = [p.name for p in path.parent.glob(f"{path.name}{_UNREADABLE}*")]
    path.rename(path.parent / f"{path.name}{_UNREADABLE}{len(taken) or ''}")


def first_line(error: BaseException, limit: int = 300) -> str:
    """What an error says, in a line of at most about ``limit`` characters."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= limit else text[:limit] + " ..."
