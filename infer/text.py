"""Text as it grows: complete code points only, and stop strings found across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What decoders put in place of bytes that do not form a code point (yet).
_REPLACEMENT = "\ufffd"
# Tokens decoded together with new ones, so that a decoder sees what joins them.
_OVERLAP = 8
# No code point has more bytes, so a longer run of replacements is really in the text.
_LONGEST_CODE_POINT = 4


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
            self._raw += self._new_text()
            self._settled = len(self._ids)
            self._look_for_stop()
            if not self.stopped:
                self.text = self._raw
        return self.text[before:]

    def _new_text(self) -> str:
        """The text that unsettled tokens add, decoded with a few before them."""
        start = max(0, self._settled - _OVERLAP)
        context = self._decode(self._ids[start : self._settled])
        return self._decode(self._ids[start:])[len(context) :]

    def _grow(self) -> None:
        new = self._new_text()
        pending = len(self._ids) - self._settled
        if new.endswith(_REPLACEMENT) and pending < _LONGEST_CODE_POINT:
            return  # The last code point may be completed by the next token.
        self._raw += new
        self._settled = len(self._ids)
        self._look_for_stop()

    def _look_for_stop(self) -> None:
        found = [i for i in (self._raw.find(s, len(self.text)) for s in self._stop) if i >= 0]
        if found:
            self.text, self.stopped = self._raw[: min(found)], True
        elif self._hold:
            self.text = self._raw[: max(len(self.text), len(self._raw) - self._hold)]
        else:
            self.text = self._raw
