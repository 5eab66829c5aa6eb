"""Passing over documents that cannot be read, so that one of them does not end a long run."""

import threading
import warnings

from ..errors import InputError
from .documents import Document, Source


class SkipBad:
    """A source whose unreadable documents, up to `limit` different ones, are empty ones.

    Each is named in a warning. They are counted from where this process opened the source.
    """

    def __init__(self, parent: Source, limit: int):
        self.label, self.block_sizes = parent.label, parent.block_sizes
        self.fingerprint, self.numbering = parent.fingerprint, parent.numbering
        self._parent, self._limit = parent, limit
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> Document:
        try:
            return self._parent[index]
        except InputError as error:
            with self._lock:
                first = index not in self._bad
                self._bad.add(index)
                count = len(self._bad)
            if count > self._limit:
                raise InputError(
                    f"{error} (skip_bad={self._limit} of source {self.label!r} is used up)"
                ) from error
            if first:
                warnings.warn(
                    f"passed over, {count} of skip_bad={self._limit}: {error}", stacklevel=2
                )
            return Document(f"{self.label}#{index}", "")
