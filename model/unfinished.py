"""A directory that is being written: under another name until it is whole, and of one source.

What a stopped conversion left is taken up only by one that would write the same: a tag in the
directory says what it is made of.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from ..errors import InputError, SaveError
from .exchange import read_directory
from .exchange.write import PARTIAL
from .published import CONFIG, is_published
from .storage import absolute, is_remote

TAG = "unfinished.json"


def describe(path: epath.PathLike, *, ema: bool = False) -> dict[str, Any]:
    """What tells these weights from any others, as values for JSON.

    Args:
        path: the directory of a published model, or that of one checkpoint.
        ema: whether its moving average is meant.

    Returns:
        Where it lies, ``ema``, and the name, size in bytes and time of change in ns (in whole
        seconds where the storage knows no better) of ``config.json`` and each file of weights, or
        of all files of a checkpoint.
    """
    directory = epath.Path(path)
    if is_published(directory):
        weights = {stored.file for stored in read_directory(directory).values()}
        files: Iterable[epath.Path] = {directory / CONFIG, *weights}
    else:
        files = _files(directory)
    return {
        "path": str(absolute(directory)),
        "ema": ema,
        "files": sorted([str(file.relative_to(directory)), *_state(file)] for file in files),
    }


@contextlib.contextmanager
def appearing(path: epath.Path, tag: Mapping[str, Any] | None = None) -> Iterator[epath.Path]:
    """A directory beside ``path`` that becomes ``path`` if the body ends well.

    Args:
        path: absolute; does not exist, or is an empty directory.
        tag: values for JSON, equal for those that would write the same. What a failure leaves is
            kept for a later call with an equal tag, which finds it in its directory; if None,
            nothing is kept. What another tag's left is removed.

    Raises:
        InputError: there is something under ``path``.
        SaveError: the disk is full, or cannot be written to; nothing stands under ``path``.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"path={str(path)!r} is there already; remove it, or give another name")
    unfinished = path.parent / (path.name + PARTIAL)
    text = None if tag is None else json.dumps(tag, indent=1, sort_keys=True) + "\n"
    try:
        if unfinished.exists() and (text is None or _tag_of(unfinished) != text):
            unfinished.rmtree()
        unfinished.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (unfinished / TAG).write_text(text)
        yield unfinished
        (unfinished / TAG).unlink(missing_ok=True)
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    except OSError as error:
        if text is None:
            _discard(unfinished)
        kept = "nothing is left" if text is None else f"what was written so far is in {unfinished}"
        raise SaveError(
            f"the model could not be saved as {path}: {error}; {kept}. Free space there, or make "
            "that path writable, and run the same again"
        ) from error
    except BaseException:
        if text is None:
            _discard(unfinished)
        raise


def _tag_of(directory: epath.Path) -> str | None:
    tag = directory / TAG
    return tag.read_text() if tag.exists() else None


def _discard(directory: epath.Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmtree()


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _state(path: epath.Path) -> tuple[int, int]:
    """``(bytes, time of change in ns)`` of a file."""
    if is_remote(path):
        state = path.stat()
        return state.length, state.mtime * 10**9
    local = os.stat(path)
    return local.st_size, local.st_mtime_ns
