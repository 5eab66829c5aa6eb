"""A cache that is bounded by the bytes it holds, not by how many things that is."""

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any


class ByteCache:
    """Keeps what was used last, up to `limit` bytes; the newest stays, however large it is.

    For threads: one makes a thing while the others wait, so that none is made twice.
    """

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0
        self._kept: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        # Re-entrant: a source that is collected while another one reads lets go of its own.
        self._lock = threading.RLock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under `key`, or else `make()`, which has `nbytes`."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made = make()
                self._held += made.nbytes
                while self._held > self._limit and len(self._kept) > 1:
                    _, oldest = self._kept.popitem(last=False)
                    self._held -= oldest.nbytes
            self._kept.move_to_end(key)
            return self._kept[key]

    def drop(self, owner: Hashable) -> None:
        """Lets go of everything whose key is a tuple that begins with `owner`."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == owner]:
                self._held -= self._kept.pop(key).nbytes
