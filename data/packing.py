"""Documents to rows of T tokens: joined, first-fit or one a row, with an exact, readable state.

Written on Grain's iterator interface, but not with its packers: their state (grain 0.2.18,
`ConcatThenSplitIterDataset`) compares tuples with a sentinel, and after a trip through JSON, which
is how Orbax stores it, the resumed rows are silently other rows. Here the state is a place in the
sequence of documents: Grain's state before the current document, and the number of its tokens
already used.
"""

from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int32

from ..errors import InputError


class Tokens(NamedTuple):
    """A document as token ids, ready to be packed; empty ones are passed over.

    `weights` says how much each counts in the loss; None is 1.
    """

    name: str
    ids: Int32[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n"] | None = None


class Row(NamedTuple):
    """A packed row.

    Attributes:
      tokens: ids; the padding id where nothing is.
      segment_ids: 1, 2, ... for the documents (or pieces of them) of the row in order, 0 for
        padding.
      positions: from 0 in every segment; 0 for padding.
      pieces: for every segment, the name of its document and the token that it begins with.
      loss_weights: how much each token counts, 0 for padding; None where all count the same.
    """

    tokens: Int32[np.ndarray, "T"]
    segment_ids: Int32[np.ndarray, "T"]
    positions: Int32[np.ndarray, "T"]
    pieces: tuple[tuple[str, int], ...]
    loss_weights: Float32[np.ndarray, "T"] | None = None


# A run of this many documents without a token is a corpus without text, not bad luck.
_MOST_EMPTY_DOCUMENTS = 100_000


class _Cursor:
    """A place in the concatenation of a stream's documents."""

    def __init__(self, documents: grain.DatasetIterator):
        self._documents = documents
        self._document: Tokens | None = None
        self._offset = 0
        self._before = documents.get_state()

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._before, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])
        self._document = None
        self._offset = state["offset"]
        self._before = state["documents"]

    def peek(self, most: int) -> Tokens | None:
        """The next tokens of one document, 1 to `most` of them; None at the end of the last."""
        empty = 0
        while self._document is None:
            try:
                document = next(self._documents)
            except StopIteration:
                return None
            if len(document.ids) > self._offset:
                self._document = document
            elif self._offset:
                raise InputError(
                    f"cannot resume: document {document.name} has {len(document.ids)} tokens, and "
                    f"{self._offset} of them were used: the corpus or the tokenizer has changed."
                )
            else:
                self._before = self._documents.get_state()
                empty += 1
                if empty == _MOST_EMPTY_DOCUMENTS:
                    raise InputError(
                        f"{empty} documents in a row are empty (the last one: {document.name}): "
                        "check the source and its field."
                    )
        here = slice(self._offset, self._offset + most)
        name, ids, weights = self._document
        return Tokens(name, ids[here], None if weights is None else weights[here])

    def skip(self, count: int) -> tuple[str, int]:
        """Passes `count` tokens that `peek` has shown; returns their document and first token."""
        piece = (self._document.name, self._offset)
        self._offset += count
        if self._offset == len(self._document.ids):
            self._document = None
            self._offset = 0
            self._before = self._documents.get_state()
        return piece

    def leave(self) -> tuple[str, int]:
        """Passes what is left of the document that `peek` has shown; returns as `skip`."""
        return self.skip(len(self._document.ids) - self._offset)


class _Builder:
    """A row while it fills."""

    def __init__(self, length: int, pad_id: int, weighted: bool):
        self._weights = np.zeros(length, np.float32) if weighted else None
        self._tokens = np.full(length, pad_id, np.int32)
        self._segment_ids = np.zeros(length, np.int32)
        self._positions = np.zeros(length, np.int32)
        self._pieces: list[tuple[str, int]] = []
        self.used = 0

    def add(self, tokens: Tokens, piece: tuple[str, int]) -> None:
        ids = tokens.ids
        start, end = self.used, self.used + len(ids)
        if self._weights is not None:
            self._weights[start:end] = 1 if tokens.weights is None else tokens.weights
        self._pieces.append(piece)
        self._tokens[start:end] = ids
        self._segment_ids[start:end] = len(self._pieces)
        self._positions[start:end] = np.arange(len(ids), dtype=np.int32)
        self.used = end

    def row(self) -> Row:
        pieces = tuple(self._pieces)
        return Row(self._tokens, self._segment_ids, self._positions, pieces, self._weights)


class _RowIterator(grain.DatasetIterator):
    """What fills one row after another; the state is the cursor's.

    Args: `length`, T; `pad_id`, what padding holds; `weighted`, whether rows have `loss_weights`.
    """

    def __init__(self, documents: grain.DatasetIterator, length: int, pad_id: int, weighted: bool):
        super().__init__(documents)
        self._cursor = _Cursor(documents)
        self._length = length
        self._pad_id = pad_id
        self._weighted = weighted

    def _builder(self) -> _Builder:
        return _Builder(self._length, self._pad_id, self._weighted)

    def get_state(self) -> dict[str, Any]:
        """`documents`: Grain's state before the current document; `offset`: its tokens used."""
        return self._cursor.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called."""
        self._cursor.set_state(state)


class SingleIterator(_RowIterator):
    """Gives every document a row of its own; what is beyond T tokens of it is left out."""

    def __next__(self) -> Row:
        tokens = self._cursor.peek(self._length)
        if tokens is None:
            raise StopIteration
        builder = self._builder()
        builder.add(tokens, self._cursor.leave())
        return builder.row()


class ConcatIterator(_RowIterator):
    """Cuts the concatenated documents every T tokens; only the very last row can have padding.

    A document that goes on in the next row is a new segment there, with positions from 0.
    """

    def __next__(self) -> Row:
        builder = self._builder()
        while builder.used < self._length:
            tokens = self._cursor.peek(self._length - builder.used)
            if tokens is None:
                break
            builder.add(tokens, self._cursor.skip(len(tokens.ids)))
        if not builder.used:
            raise StopIteration
        return builder.row()


class FirstFitIterator(_RowIterator):
    """Puts every document whole into the first of a window of rows that has room for it.

    A document longer than T is cut into pieces of T first. When a piece fits nowhere, the window's
    rows are handed out in order and a new window begins with that piece (so a piece is never moved
    more than a window away from its place, and the state is the place where the window began).
    """

    _WINDOW = 16

    def __init__(self, documents: grain.DatasetIterator, length: int, pad_id: int, weighted: bool):
        super().__init__(documents, length, pad_id, weighted)
        self._window: list[Row] = []
        self._start = self._cursor.get_state()
        self._given = 0  # Rows of the window that have been handed out.

    def _fill(self) -> list[Row]:
        builders: list[_Builder] = []
        while (tokens := self._cursor.peek(self._length)) is not None:
            size = len(tokens.ids)
            fits = (b for b in builders if b.used + size <= self._length)
            builder = next(fits, None)
            if builder is None:
                if len(builders) == self._WINDOW:
                    break
                builder = self._builder()
                builders.append(builder)
            builder.add(tokens, self._cursor.skip(size))
        return [b.row() for b in builders]

    def __next__(self) -> Row:
        if not self._window:
            self._window = self._fill()
            if self._given >= len(self._window) > 0:
                raise InputError("cannot resume: the corpus or the tokenizer has changed.")
        if not self._window:
            raise StopIteration
        row = self._window[self._given]
        self._given += 1
        if self._given == len(self._window):
            self._window = []
            self._start = self._cursor.get_state()
            self._given = 0
        return row

    def get_state(self) -> dict[str, Any]:
        """Where the window began (see `ConcatIterator`); `row`: how many of its rows are out."""
        return {**self._start, "row": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called: packs the window once more."""
        self._given = state["row"]
        self._start = {k: v for k, v in state.items() if k != "row"}
        self._cursor.set_state(self._start)
        self._window = []


_ITERATORS = {"concat": ConcatIterator, "first_fit": FirstFitIterator, "single": SingleIterator}


class PackIterDataset(grain.IterDataset):
    """Grain dataset of `Row`s from a Grain dataset of `Tokens`."""

    def __init__(
        self,
        documents: grain.IterDataset,
        packing: str,
        length: int,
        pad_id: int,
        *,
        weighted: bool = False,
    ):
        """Args: `packing`, as in `DataConfig`; `length`, T; `pad_id`, what padding holds.

        `weighted`: rows have `loss_weights`.
        """
        super().__init__(documents)
        self._weighted = weighted
        self._make = _ITERATORS[packing]
        self._length = length
        self._pad_id = pad_id

    def __iter__(self) -> grain.DatasetIterator:
        documents = self._parent.__iter__()
        return self._make(documents, self._length, self._pad_id, self._weighted)
