"""From sources to rows, and from the rows of many streams to batches.

A stream reads its share of the documents of every source and packs it. Which source a row comes
from depends on the row's number in the run alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int32

from ..errors import InputError
from .chat import encode_answer
from .config import DataConfig, SourceConfig
from .documents import Document, Source, Split
from .packing import PackIterDataset, Row, Tokens
from .readers import open_source
from .tokenizers import Tokenizer

Batch = dict[str, Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T"]]

# Which rows of a batch: blocks of neighbours, in ascending order.
RowBlocks = Sequence[range]


def pad_id(tokenizer: Tokenizer) -> int:
    """What padding holds: the tokenizer's own id for it, or 0."""
    return 0 if tokenizer.pad_id is None else tokenizer.pad_id


def open_sources(config: DataConfig, split: Split) -> list[tuple[SourceConfig, Source]]:
    """The sources of a split, opened."""
    if config.eval_sources:
        chosen = config.eval_sources if split == "eval" else config.sources
        return [(c, open_source(c)) for c in chosen]
    return [(c, open_source(c, split, config.holdout_fraction)) for c in config.sources]


def encoder(config: DataConfig, tokenizer: Tokenizer) -> Callable[[Document], Tokens]:
    """Document -> Tokens, with those that begin, end and fill up a text; an empty one has none.

    Where sources have prompts, tokens have weights: 0 for a prompt, 1 for what is learnt. A chat's
    template writes what begins it.
    """
    if config.add_bos and tokenizer.bos_id is None:
        raise InputError(
            f"data: add_bos=True, but the tokenizer {config.tokenizer!r} has no BOS. "
            "Set add_bos=False."
        )
    begin = [tokenizer.bos_id] if config.add_bos else []
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def halves(document):
        if document.messages:
            try:
                prompt, answer = encode_answer(tokenizer, document.messages)
            except InputError as e:
                raise InputError(f"{document.name}: {e}") from e
            return prompt, answer if set(end) & set(answer) else [*answer, *end]
        if not document.text:
            return [], []
        answer = [*tokenizer.encode(document.text), *end]
        if not document.prompt:
            return [], [*begin, *answer]
        return [*begin, *tokenizer.encode(document.prompt)], answer

    def encode(document):
        prompt, answer = halves(document)
        ids = [*prompt, *answer]
        padding = [pad_id(tokenizer)] * (-len(ids) % config.align)
        weights = None
        if config.has_prompts:
            learnt = [0] * len(prompt) + [1] * len(answer) + [0] * len(padding)
            weights = np.array(learnt, np.float32)
        return Tokens(document.name, np.array(ids + padding, np.int32), weights)

    return encode


def packed_rows(
    config: DataConfig,
    tokenizer: Tokenizer,
    documents: grain.MapDataset,
    stream: int,
    num_streams: int,
) -> grain.IterDataset:
    """The packed rows of one stream of `documents`."""
    tokens = documents[stream::num_streams].map(encoder(config, tokenizer))
    threads = config.read_threads
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return PackIterDataset(
        tokens.to_iter_dataset(read),
        config.packing,
        config.sequence_length,
        pad_id(tokenizer),
        weighted=config.has_prompts,
    )


def streams_of_rows(config: DataConfig, blocks: RowBlocks) -> list[int]:
    """The streams that fill these rows of a batch, in their order.

    Raises:
      InputError: a block has a part of a stream's rows, or rows that are not there.
    """
    size, num_streams = config.batch_size, config.streams
    per_stream = size // num_streams
    for block in blocks:
        if not 0 <= block.start < block.stop <= size:
            raise InputError(f"data: {block} is no block of the rows of batch_size={size}.")
    cut = [b for b in blocks if b.start % per_stream or b.stop % per_stream]
    if cut:
        most = math.gcd(size, *(edge for b in blocks for edge in (b.start, b.stop)))
        raise InputError(
            f"data: num_streams={num_streams} cannot be used: a process has to fill rows "
            f"{cut[0].start} to {cut[0].stop - 1} of batch_size={size}, and a stream fills "
            f"{per_stream} neighbours. Set num_streams to a multiple of {size // most} that "
            "divides batch_size."
        )
    return [v for b in blocks for v in range(b.start // per_stream, b.stop // per_stream)]


def source_of_rows(weights: Sequence[float], rows: np.ndarray) -> np.ndarray:
    """Which source each row of a run comes from.

    The fractional parts of row * golden ratio are spread evenly over [0, 1) in any stretch of rows,
    so every batch has nearly the exact mixture, and so has the run.

    Args:
      weights: share of every source, in any unit.
      rows: row numbers in the run (step * batch_size + row), integers [n].

    Returns:
      Indices into `weights`, [n].
    """
    golden = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: exact modulo 2**64.
    # 53 bits fit a float64 exactly: rounding must not reach 1.
    places = ((rows.astype(np.uint64) * golden) >> np.uint64(11)) / 2.0**53
    ends = np.cumsum(weights)
    return np.searchsorted(ends / ends[-1], places, side="right")


class Made(NamedTuple):
    """A batch, and the pieces of documents that each of its rows holds."""

    batch: Batch
    pieces: tuple[tuple[tuple[str, int], ...], ...]


def stack(rows: Sequence[Row]) -> Batch:
    """Rows to a batch."""
    names = ["tokens", "segment_ids", "positions"]
    if rows[0].loss_weights is not None:
        names.append("loss_weights")
    return {name: np.stack([getattr(row, name) for row in rows]) for name in names}


class _BatchIterator(grain.DatasetIterator):
    """Assembles the rows that this process owns; its state is the step and that of each stream."""

    def __init__(self, config: DataConfig, streams: dict[int, list[grain.DatasetIterator]]):
        super().__init__([rows for sources in streams.values() for rows in sources])
        self._config = config
        self._streams = streams
        self._step = 0

    def __next__(self) -> Made:
        config = self._config
        per_stream = config.batch_size // config.streams
        numbers = self._step * config.batch_size + np.arange(config.batch_size)
        chosen = source_of_rows([s.weight for s in config.sources], numbers)
        rows = [
            next(sources[chosen[r]])
            for v, sources in self._streams.items()
            for r in range(v * per_stream, (v + 1) * per_stream)
        ]
        self._step += 1
        return Made(stack(rows), tuple(r.pieces for r in rows))

    def get_state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "streams": {str(v): [s.get_state() for s in ss] for v, ss in self._streams.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        for v, sources in self._streams.items():
            for rows, saved in zip(sources, state["streams"][str(v)], strict=True):
                rows.set_state(saved)


class BatchDataset(grain.IterDataset):
    """The batches of a process as a dataset, for Grain's prefetch thread to stand behind."""

    def __init__(self, config: DataConfig, streams: dict[int, list[grain.IterDataset]]):
        super().__init__([rows for sources in streams.values() for rows in sources])
        self._config = config
        self._streams = streams

    def __iter__(self) -> _BatchIterator:
        opened = {v: [rows.__iter__() for rows in ss] for v, ss in self._streams.items()}
        return _BatchIterator(self._config, opened)
