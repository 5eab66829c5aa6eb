"""Temporary files that do not outlive their process by much, even if it is killed.

They may be as large as a corpus. A process holds a lock on the folder of its own; the system lets
go of the lock however the process ends, and the next one that needs a folder clears those away
which nobody holds. (A process number in the name would not do: containers that share a disk count
their processes apart.)
"""

import os
import shutil
import tempfile
import weakref

from etils import epath

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays there.
    fcntl = None

_LOCKED = "jaxalope-scratch-"
_NOT_LOCKED = "jaxalope-new-"


def make_scratch(owner: object) -> epath.Path:
    """An empty folder for temporary files, which goes when `owner` does."""
    parent = tempfile.gettempdir()
    _remove_abandoned(parent)
    path = tempfile.mkdtemp(prefix=_NOT_LOCKED, dir=parent)
    lock = _lock(path)
    if lock is not None:  # Only now may others take it for abandoned when it is not locked.
        locked = os.path.join(parent, _LOCKED + os.path.basename(path).removeprefix(_NOT_LOCKED))
        os.rename(path, locked)
        path = locked
    weakref.finalize(owner, _remove, path, lock)
    return epath.Path(path)


def _lock(path: str) -> int | None:
    """An open file that holds the lock of a folder; None if it is held, or cannot be had."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Somebody else's.
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove(path: str, lock: int | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _remove_abandoned(parent: str) -> None:
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if name.startswith(_LOCKED) and (lock := _lock(path)) is not None:
            _remove(path, lock)
