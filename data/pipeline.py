"""The input pipeline: batches that are a function of the settings and the step alone.

A global batch is filled by V streams, fixed by the settings whatever the number of processes:
stream v packs documents v, v + V, v + 2V, ... of every source's endless, per-epoch shuffled
sequence of documents (dealt out like cards: so a corpus with fewer documents than streams works
too, its next epochs are dealt to the streams that the first one did not reach), and fills the v-th
of V equal blocks of rows in every batch. A process reads the streams that fill its rows. Which
source a row comes from depends on its number in the run. So nothing depends on how many processes
there are, or on who has which rows, and the state of a run is that of its V streams.
"""

import collections
import dataclasses
import itertools
import json
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from ..errors import InputError
from .config import DataConfig
from .documents import Split
from .packing import Row
from .shuffle import shuffled
from .streams import (
    Batch,
    BatchDataset,
    RowBlocks,
    open_sources,
    packed_rows,
    pad_id,
    source_of_rows,
    stack,
    streams_of_rows,
)
from .tokenizers import Tokenizer

# Evaluation always reads through this many, so that its rows depend on T and the corpus only.
_EVAL_STREAMS = 16
_REMEMBERED_STEPS = 64


class Pipeline:
    """Endless training batches of one process. Close it, or use it as a context manager.

    A batch is a dict of arrays [b, T], int32 but for the weights, of those b rows of the global
    batch that belong to this process, in their order:
      `tokens`: ids.
      `segment_ids`: 1, 2, ... along a row, 0 for padding; attention stays within a segment.
      `positions`: from 0 in every segment.
      `loss_weights`: float32, 0 for prompts and padding; only where a source has prompts.
    Objectives shift the targets themselves.

    The batches are assembled by hand from one row at a time, behind at most one prefetch thread:
    Grain's own batching in front of several workers can lose rows (google/grain#1129).
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        split: Split = "train",
        rows: RowBlocks | None = None,
    ):
        """Opens the sources; reads documents only when the first batch is asked for.

        Args:
          config: what batches are made of.
          tokenizer: the run's.
          split: which documents.
          rows: those of the global batch that this process fills; all of them if None. Others may
            fill the same ones.

        Raises:
          InputError: a source is missing or empty, or `rows` has a part of a stream's rows.
        """
        blocks = [range(config.batch_size)] if rows is None else rows
        self._rows = list(itertools.chain(*blocks))
        self._streams = streams_of_rows(config, blocks)
        opened = open_sources(config, split)
        if split == "eval" and config.eval_sources:
            # From here on its sources are the ones that are read.
            config = dataclasses.replace(config, sources=config.eval_sources, eval_sources=())
        self.config = config
        seeds = np.random.SeedSequence(config.seed).generate_state(len(opened))
        self._layout = {
            "split": split,
            "sequence_length": config.sequence_length,
            "batch_size": config.batch_size,
            "num_streams": config.streams,
            "packing": config.packing,
            "add_bos": config.add_bos,
            "align": config.align,
            "seed": config.seed,
            "shuffle": config.shuffle,
            "tokenizer": tokenizer.fingerprint,
            "sources": [
                {
                    "weight": c.weight,
                    "documents": len(s),
                    "numbering": s.numbering,
                    "content": s.fingerprint,
                }
                for c, s in opened
            ],
        }
        documents = [
            shuffled(source, int(seed)) if config.shuffle else grain.MapDataset.source(source)
            for (_, source), seed in zip(opened, seeds, strict=True)
        ]
        rows = {
            v: [packed_rows(config, tokenizer, ds.repeat(), v, config.streams) for ds in documents]
            for v in self._streams
        }
        batches = grain.experimental.ThreadPrefetchIterDataset(
            BatchDataset(config, rows), prefetch_buffer_size=config.prefetch_batches
        )
        iterator = iter(batches)
        self._state = iterator.get_state()
        # The last reference goes with `close`, or at exit while Grain's modules are still alive.
        self._open = [iterator]
        self._finalizer = weakref.finalize(self, _release, self._open)
        self._pieces: collections.OrderedDict[int, Any] = collections.OrderedDict()

    @property
    def step(self) -> int:
        """How many batches have been handed out: the number of the next one."""
        return self._state["step"]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._open:
            raise ValueError("this pipeline is closed.")
        made = next(self._open[0])
        self._state = self._open[0].get_state()
        self._pieces[self.step - 1] = made.pieces
        if len(self._pieces) > _REMEMBERED_STEPS:
            self._pieces.popitem(last=False)
        return made.batch

    def describe(self, step: int | None = None) -> str:
        """The identity of a recent batch: for this process's rows, which text they hold.

        Args:
          step: one of the last 64 that were handed out; by default the last.
        """
        if step is None:
            step = self.step - 1
        if step not in self._pieces:
            return f"batch {step} (no longer, or not yet, in memory)"
        rows = (
            f"row {row}: "
            + ", ".join(f"{name} from token {offset}" for name, offset in pieces[:3])
            + (f" and {len(pieces) - 3} more" if len(pieces) > 3 else "")
            for row, pieces in zip(self._rows, self._pieces[step], strict=True)
        )
        return f"batch {step} (seed {self.config.seed}); " + "; ".join(rows)

    def state(self) -> dict[str, Any]:
        """Where this process stands: what is needed to hand out the very next batch again.

        JSON-able. Batches made ahead do not count. With several processes, every one has its own
        part; `merge_states` joins them into one that any number of processes can restore.
        """
        return json.loads(json.dumps({**self._state, "layout": self._layout}))

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state()` was called, in this or another process of this or another run.

        A corpus may have been edited since, if its documents have the same numbers; a warning says
        so. The batches to come then hold the documents as they are now.

        Args:
          state: of all streams that this process owns, at least.

        Raises:
          InputError: it belongs to other settings or another corpus, or lacks a stream.
        """
        try:
            # States that were written before there was such a thing have no `align`.
            layout, streams = {"align": 1, **state["layout"]}, state["streams"]
        except (KeyError, TypeError) as e:
            raise InputError("data: this is not the state of a data pipeline.") from e
        here = self._layout["sources"]
        edited = _edited(layout.get("sources"), here)
        if edited is not None:
            layout["sources"] = here
        different = [
            f"{k}: {layout.get(k)!r} there, {v!r} here"
            for k, v in self._layout.items()
            if layout.get(k) != v
        ]
        if different:
            raise InputError(
                "data: the saved state cannot be continued exactly, because the data or its "
                f"settings are not those it was saved with ({'; '.join(different)}). Use "
                "the same ones (documents may be edited while their number stays), or start in a "
                "new workdir."
            )
        missing = [v for v in self._streams if str(v) not in streams]
        if missing:
            raise InputError(
                f"data: the saved state lacks streams {missing}: it is one process's part. Join "
                "the parts of all processes with merge_states."
            )
        self._open[0].set_state(
            {"step": state["step"], "streams": {str(v): streams[str(v)] for v in self._streams}}
        )
        self._state = self._open[0].get_state()
        self._pieces.clear()
        for number in edited or ():
            warnings.warn(
                f"source {self.config.sources[number].path!r} was edited since the state was "
                "saved; going on with its documents as they are now",
                stacklevel=2,
            )

    def close(self) -> None:
        """Ends the threads. Left to garbage collection they can live on (google/grain#1021)."""
        self._finalizer()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _edited(saved: Any, here: Sequence[dict[str, Any]]) -> list[int] | None:
    """Which sources have other content under the same numbers; None if more than that differs."""
    if not isinstance(saved, list) or len(saved) != len(here):
        return None
    edited = []
    for number, (then, now) in enumerate(zip(saved, here, strict=True)):
        # States that were written before there was such a thing have no `numbering`.
        then = {"numbering": now["numbering"], **then}
        if {**then, "content": now["content"]} != now:
            return None
        if then["content"] != now["content"]:
            edited.append(number)
    return edited


def _release(iterators: list[grain.DatasetIterator]) -> None:
    for iterator in iterators:
        iterator.close()
    iterators.clear()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the states of all processes of a run, taken after the same step, into one.

    Raises:
      InputError: they are of different steps or settings.
    """
    first = states[0]
    for other in states[1:]:
        if (other["step"], other["layout"]) != (first["step"], first["layout"]):
            raise InputError(
                "data: states of different runs or steps cannot be merged (steps "
                f"{sorted({s['step'] for s in states})})."
            )
    return {**first, "streams": {v: s for state in states for v, s in state["streams"].items()}}


def eval_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    num_batches: int | None = None,
    rows: RowBlocks | None = None,
) -> Iterator[Batch]:
    """One pass over the held-out documents, the same every time and for every seed.

    Args:
      config: `eval_sources`, or the held-out side of `sources`.
      tokenizer: the run's.
      num_batches: stop after so many; None: when all documents have been read.
      rows: which of every batch to return; all of them if None. Every process gets the same number
        of batches.

    Yields:
      Batches as `Pipeline` does. Rows that are missing in the last one are padding (segment 0).

    Raises:
      InputError: nothing is held out.
    """
    mine = list(range(config.batch_size) if rows is None else itertools.chain(*rows))
    return _eval_batches(config, tokenizer, open_sources(config, "eval"), num_batches, mine)


def _eval_batches(config, tokenizer, opened, num_batches, mine):
    rows = _eval_rows(config, tokenizer, opened)
    length = config.sequence_length
    blank = np.full(length, pad_id(tokenizer), np.int32)
    zeros = np.zeros(length, np.int32)
    made = 0
    # Every process packs all rows and keeps its own: held-out sets are small, and so all of them
    # end after the same batch without having to talk about it.
    while made != num_batches:
        batch = list(itertools.islice(rows, config.batch_size))
        if not batch and not made:
            raise InputError("data: the held-out documents are all empty.")
        if not batch:
            return
        weights = zeros.astype(np.float32) if config.has_prompts else None
        batch += [Row(blank, zeros, zeros, (), weights)] * (config.batch_size - len(batch))
        yield stack([batch[r] for r in mine])
        made += 1


def _eval_rows(config, tokenizer, opened) -> Iterator[Row]:
    """The rows of all sources, mixed by weight while they last; streams of a source take turns."""
    turns = [
        collections.deque(
            iter(packed_rows(config, tokenizer, grain.MapDataset.source(source), v, _EVAL_STREAMS))
            for v in range(min(_EVAL_STREAMS, len(source)))
        )
        for _, source in opened
    ]
    weights = np.array([c.weight for c, _ in opened])
    try:
        for number in itertools.count():
            left = [bool(t) for t in turns]
            if not any(left):
                return
            streams = turns[source_of_rows(weights * left, np.array([number]))[0]]
            while streams:
                row = next(streams[0], None)
                if row is not None:
                    streams.rotate(-1)
                    yield row
                    break
                streams.popleft().close()
    finally:
        for iterator in itertools.chain(*turns):
            iterator.close()
