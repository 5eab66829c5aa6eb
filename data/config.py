"""What a run reads: sources and their weights, tokenizer, packing, the shape of a batch.

Plain frozen values (JSON goes in and out), so that the settings can live in an experiment's file,
in a checkpoint and in an error message. The code that obeys them is in the files beside this one.
"""

import dataclasses

from ..errors import InputError

FORMATS = ("auto", "stdlib", "text", "jsonl", "parquet", "arrayrecord")
PACKINGS = ("concat", "first_fit", "single")

# The default number of streams: enough for rows of a batch to come from different documents, few
# enough to keep the data state small. Fixed: changing it changes every batch of every default run.
_MAX_DEFAULT_STREAMS = 64


def _require(ok: bool, field: str, value: object, remedy: str) -> None:
    if not ok:
        raise InputError(f"data: {field}={value!r} cannot be used: {remedy}")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One corpus.

    Attributes:
      path: `"stdlib"` (the running Python's own library), or a file, a directory or a glob, local
        or on any file system that `etils.epath` opens (`gs://...`).
      format: one of `FORMATS`; `auto` goes by the names of the files.
      field: the field (JSONL, ArrayRecord) or column (Parquet) that holds the text. Empty, for
        ArrayRecord: the record itself is the text. Not used by plain text.
      prompt: the field or column that holds what is read before the text and not learnt; empty for
        none. For corpora of records, as is `chat`.
      chat: `field` holds a list of messages (`{"role": ..., "content": ...}`), written by the
        tokenizer's chat template. The last message is learnt, all before it is its prompt.
      weight: share of the *rows* of a batch, thus of the tokens, relative to the other sources.
      max_document_bytes: a longer text file is cut, at line ends where it can, into documents of
        about this many bytes; other formats say themselves where a document ends.
      skip_bad: so many documents that cannot be read (not UTF-8, not JSON, no such field) are
        passed over as if they were empty, each with a warning; the next one is an error.
    """

    path: str = "stdlib"
    format: str = "auto"
    field: str = "text"
    prompt: str = ""
    chat: bool = False
    weight: float = 1.0
    max_document_bytes: int = 65536
    skip_bad: int = 0

    def __post_init__(self):
        _require(
            bool(self.path), "path", self.path, 'name a file, a directory, a glob or "stdlib".'
        )
        _require(self.format in FORMATS, "format", self.format, f"use one of {', '.join(FORMATS)}.")
        _require(
            not (self.chat and (self.prompt or not self.field)),
            "chat",
            self.chat,
            "its messages are in `field`, and hold their own prompt: name the field, no prompt.",
        )
        _require(0 < self.weight < float("inf"), "weight", self.weight, "use a positive number.")
        _require(
            self.max_document_bytes >= 64,
            "max_document_bytes",
            self.max_document_bytes,
            "use at least 64 bytes.",
        )
        _require(self.skip_bad >= 0, "skip_bad", self.skip_bad, "use 0 or more.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the batches of a run are made of.

    Attributes:
      sequence_length: T, tokens in a row.
      batch_size: rows in a step over all processes and accumulation steps.
      sources: the corpora, mixed by their weights.
      eval_sources: held-out corpora, read whole by the evaluation. Empty: `holdout_fraction` of the
        documents of every source in `sources` is kept out of training for it.
      holdout_fraction: see `eval_sources`; ignored (nothing is held out) where that is given.
      tokenizer: `"bytes"`, or what `load_tokenizer` takes.
      packing: `"concat"` cuts the joined documents every T tokens and wastes none; `"first_fit"`
        keeps documents of at most T tokens whole and pads; `"single"` has one document a row, of
        which what is beyond T tokens is left out.
      align: every document is filled up with the padding id to a multiple of this many tokens. They
        are tokens of it, so that a model that reads chunks has one document in each.
      add_bos: start every document with the tokenizer's BOS. (EOS ends every document if there is
        one.)
      seed: order of the documents and of the mixture, below 2**32.
      shuffle: a new order of the documents each epoch; otherwise they come as stored.
      num_streams: V, the number of independent readers that fill a batch; it fixes the batches.
        Each fills a block of neighbouring rows, and a process has to have all of these or none.
        None: the largest divisor of `batch_size` up to 64.
      prefetch_batches: batches made ahead in a thread; 0 makes them when asked.
      read_threads: threads per stream and source that read and tokenize documents ahead, for
        storage with a long delay; 0 reads when needed.
    """

    sequence_length: int
    batch_size: int
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    eval_sources: tuple[SourceConfig, ...] = ()
    holdout_fraction: float = 0.05
    tokenizer: str = "bytes"
    packing: str = "concat"
    align: int = 1
    add_bos: bool = False
    seed: int = 0
    shuffle: bool = True
    num_streams: int | None = None
    prefetch_batches: int = 2
    read_threads: int = 0

    def __post_init__(self):
        _require(
            self.sequence_length >= 2,
            "sequence_length",
            self.sequence_length,
            "a row needs two tokens at least, one to read and one to predict.",
        )
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more.")
        _require(len(self.sources) > 0, "sources", self.sources, "name at least one source.")
        _require(
            0 <= self.holdout_fraction <= 0.5,
            "holdout_fraction",
            self.holdout_fraction,
            "use a number from 0 to 0.5.",
        )
        _require(bool(self.tokenizer), "tokenizer", self.tokenizer, 'use "bytes" or a path.')
        _require(
            self.packing in PACKINGS, "packing", self.packing, f"use one of {', '.join(PACKINGS)}."
        )
        _require(
            self.align >= 1 and self.sequence_length % self.align == 0,
            "align",
            self.align,
            f"it has to divide sequence_length={self.sequence_length}; 1 fills nothing up.",
        )
        _require(0 <= self.seed < 2**32, "seed", self.seed, "use 0 to 2**32 - 1.")
        _require(
            self.prefetch_batches >= 0, "prefetch_batches", self.prefetch_batches, "use 0 or more."
        )
        _require(self.read_threads >= 0, "read_threads", self.read_threads, "use 0 or more.")
        if self.num_streams is not None:
            _require(
                self.num_streams >= 1 and self.batch_size % self.num_streams == 0,
                "num_streams",
                self.num_streams,
                f"it has to divide batch_size={self.batch_size}.",
            )

    @property
    def has_prompts(self) -> bool:
        """Whether a source says what is read and not learnt; batches then have `loss_weights`."""
        return any(s.chat or s.prompt for s in (*self.sources, *self.eval_sources))

    @property
    def streams(self) -> int:
        """V, with the default resolved."""
        if self.num_streams is not None:
            return self.num_streams
        most = min(self.batch_size, _MAX_DEFAULT_STREAMS)
        return max(v for v in range(1, most + 1) if self.batch_size % v == 0)
