"""Text as it grows: complete code points only, and stop strings found across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What decoders put in place of bytes that do not form a code point (yet).
_REPLACEMENT = "\ufffd"
# Tokens after which replacements are taken to be really in the text. A code point has at most four,
# but tokens may straddle code points, so that many in a row end in the middle of one; the bound is
# there so that bytes which are no text at all are not decoded anew for ever.
_LONGEST_OPEN = 64


class TextStream:
    """The text of one row, fed token by token.

    Args:
        decode: token ids to text; bytes that form no code point become U+FFFD.
        stop: strings that end the row; the text ends before the first of them.

    Attributes:
        text: what is certain so far: complete code points that can no longer be part of a stop
            string.
        stopped: whether a stop string was found.
        num_tokens: tokens pushed, up to the one that completed the stop string.
    """

    def __init__(self, decode: Any, stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._ids: list[int] = []
        self._settled = 0  # Tokens whose text is in _raw for good.
        # Where those before these were settled: decoded together with new ones, so that a decoder
        # sees what joins them. Text was complete there, so no code point is cut.
        self._start = 0
        self._raw = ""  # Decoded text, stop strings not yet looked for in its end.
        self.text = ""
        self.stopped = False
        self.num_tokens = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns what they add to :attr:`text`."""
        before = len(self.text)
        for token in tokens:
            if self.stopped:
                break
            self._ids.append(int(token))
            self.num_tokens += 1
            self._grow()
        return self.text[before:]

    def finish(self) -> str:
        """No more tokens come: what was held back, incomplete code points as U+FFFD."""
        before = len(self.text)
        if not self.stopped:
            self._settle(self._new_text())
            if not self._look_for_stop(self._raw):
                self.text = self._raw
        return self.text[before:]

    def _new_text(self) -> str:
        """The text that unsettled tokens add, decoded with those settled last."""
        context = self._decode(self._ids[self._start : self._settled])
        return self._decode(self._ids[self._start :])[len(context) :]

    def _settle(self, new: str) -> None:
        self._raw += new
        self._start, self._settled = self._settled, len(self._ids)

    def _grow(self) -> None:
        new = self._new_text()
        if new.endswith(_REPLACEMENT) and len(self._ids) - self._settled < _LONGEST_OPEN:
            # The last code point may be completed by the next token; what stands before it may
            # hold a stop string already.
            self._look_for_stop(self._raw + new.rstrip(_REPLACEMENT))
            return
        self._settle(new)
        if not self._look_for_stop(self._raw):
            self.text = self._raw[: max(len(self.text), len(self._raw) - self._hold)]

    def _look_for_stop(self, text: str) -> bool:
        found = [i for i in (text.find(s, len(self.text)) for s in self._stop) if i >= 0]
        if found:
            self.text, self.stopped = text[: min(found)], True
        return self.stopped
