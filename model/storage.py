"""Where files lie: on a local disk or an object store, and storage that fails for the moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from etils import epath

# A network mount that hiccups, or too many open files.
_ERRNOS = (
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)
# TensorStore raises a ValueError for everything: the status, or the system's words, tell.
_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", *map(os.strerror, _ERRNOS[:4]))


def is_remote(path: epath.PathLike) -> bool:
    """Whether ``path`` is a URL (``gs://...``), and not of a file system that is mounted here."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """``path`` from the root, the home directory written out; a URL as it is."""
    path = epath.Path(path).expanduser()
    return path if is_remote(path) else path.absolute()


def is_transient(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, is of the storage and says nothing about the files."""
    return any(
        isinstance(e, ConnectionError | TimeoutError)
        or (isinstance(e, OSError) and e.errno in _ERRNOS)
        or any(words in str(e) for words in _WORDS)
        for e in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what caused it, the innermost last."""
    if error is None:
        return
    yield error
    for member in getattr(error, "exceptions", ()):  # of an ExceptionGroup
        yield from causes(member)
    yield from causes(error.__cause__ if error.__suppress_context__ else error.__context__)
