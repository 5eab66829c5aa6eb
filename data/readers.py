"""Corpora as Grain random-access sources: `open_source` and the reader of plain text.

A source has `__len__` and `__getitem__(i) -> Document`: what a seeded shuffle, a share for every
reader and an exact resume need. What is kept in memory is where documents are (names, sizes,
offsets), never the documents.
"""

import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from ..errors import InputError
from . import corpora, records
from .config import SourceConfig
from .documents import (
    Document,
    File,
    Source,
    Split,
    decode_utf8,
    fingerprint_of,
    list_files,
    read_range,
)
from .skip_bad import SkipBad

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}


def _format_of(name: str) -> str:
    # Sharded files are called like c4.array_record-00001-of-00512.
    name = re.sub(r"-\d+-of-\d+$", "", name.lower())
    return next((f for suffix, f in _SUFFIXES.items() if name.endswith(suffix)), "text")


class TextSource:
    """Text files; a file longer than `max_document_bytes` is cut into several documents.

    Piece k of a file spans the line ends that follow bytes k * max and (k + 1) * max, so that a
    piece is found by reading it alone. A stretch of `max` bytes without a line end is cut between
    code points.
    """

    block_sizes = None

    def __init__(
        self,
        label: str,
        files: Sequence[File],
        split: Split,
        holdout_fraction: float,
        max_document_bytes: int,
        *,
        by_file: bool = False,
        skip_undecodable: bool = False,
    ):
        """Args: `by_file` keeps the pieces of a file on one side of the split."""
        self.label = label
        self._files = list(files)
        self._max = max_document_bytes
        self._skip_undecodable = skip_undecodable
        pieces = [
            (f, k)
            for f, file in enumerate(files)
            for k in range(-(-file.size // max_document_bytes))
        ]
        if split != "all":
            names = [self._name(f, 0 if by_file else k) for f, k in pieces]
            held_out = corpora.held_out_names(names, holdout_fraction)
            keep = [(name in held_out) == (split == "eval") for name in names]
            pieces = [piece for piece, kept in zip(pieces, keep, strict=True) if kept]
        self._pieces = np.array(pieces, np.int64).reshape(-1, 2)
        self.fingerprint = fingerprint_of(
            [split, holdout_fraction, max_document_bytes, *((f.name, f.size) for f in files)]
        )
        counts = ((f.name, -(-f.size // max_document_bytes)) for f in files)
        self.numbering = fingerprint_of([split, holdout_fraction, max_document_bytes, *counts])

    def _name(self, file: int, piece: int) -> str:
        start = piece * self._max
        return self._files[file].name + (f"@{start}" if start else "")

    def _boundary(self, data: bytes, offset: int) -> int:
        """Where a cut at `offset` of `data` really falls: after the next line end within reach."""
        newline = data.find(b"\n", offset, offset + self._max)
        if newline >= 0:
            return newline + 1
        while offset < len(data) and data[offset] & 0xC0 == 0x80:
            offset += 1
        return offset

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> Document:
        f, k = map(int, self._pieces[index])
        file, start = self._files[f], k * self._max
        # A piece needs what follows it, to see where the next one really starts.
        data = read_range(file.path, start, min(start + 2 * self._max, file.size))
        begin = self._boundary(data, 0) if k else 0
        end = len(data) if start + self._max >= file.size else self._boundary(data, self._max)
        name = self._name(f, k)
        try:
            return Document(name, decode_utf8(data[begin:end], start + begin, str(file.path)))
        except InputError:
            if self._skip_undecodable:
                return Document(name, "")
            raise


def _by_files(config: SourceConfig) -> tuple[str, list[File]]:
    files = list_files(config.path)
    if config.format != "auto":
        return config.format, files
    formats = {_format_of(f.name): f.name for f in files}
    if len(formats) > 1:
        examples = ", ".join(f"{name} ({f})" for f, name in sorted(formats.items()))
        raise InputError(
            f"source {config.path!r} mixes formats: {examples}. Name a glob such as "
            "'*.jsonl.gz', or set format."
        )
    return next(iter(formats)), files


def open_source(
    config: SourceConfig, split: Split = "all", holdout_fraction: float = 0.0
) -> Source:
    """Opens one corpus, or one side of it.

    Args:
      config: which corpus.
      split: `"train"` or `"eval"`, the two sides of the hold-out, or `"all"`.
      holdout_fraction: share of the documents on the `eval` side.

    Raises:
      InputError: missing, empty, unreadable, or nothing on this side of the split.
    """

    def of_records():
        if config.chat or config.prompt:
            raise InputError(
                f"source {config.path!r} is plain text, which has no fields: chat and prompt are "
                "for JSONL, Parquet and ArrayRecord."
            )

    if "stdlib" in (config.path, config.format):
        of_records()
        root = None if config.path == "stdlib" else epath.Path(config.path).expanduser()
        files = [File(n, p, p.stat().length) for n, p in corpora.stdlib_files(root)]
        source = TextSource(
            config.path,
            [f for f in files if f.size],
            split,
            holdout_fraction,
            config.max_document_bytes,
            by_file=True,
            # A source file may declare another encoding: legal there, and not the user's to mend.
            skip_undecodable=True,
        )
    else:
        format, files = _by_files(config)
        if format == "text":
            of_records()
            source = TextSource(
                config.path, files, split, holdout_fraction, config.max_document_bytes
            )
        else:
            reader = records.READERS[format]
            source = records.open_records(reader, config, files, split, holdout_fraction)
    if len(source) == 0:
        raise InputError(
            f"source {config.path!r} has no document on its {split} side "
            f"(holdout_fraction={holdout_fraction}): give it more documents, another "
            "holdout_fraction, or name eval_sources."
        )
    return SkipBad(source, config.skip_bad) if config.skip_bad else source
