"""Corpora that say themselves where a document ends: JSONL (+ .gz, .zst), Parquet, ArrayRecord."""

import gzip
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from ..errors import InputError
from . import corpora
from .cache import ByteCache
from .config import SourceConfig
from .documents import Document, File, Source, Split, decode_utf8, fingerprint_of, read_range
from .scratch import make_scratch
from .tf_example import parse_example

_CHUNK = 1 << 24
# The row groups in use, of all sources of the process. The streams of a run drift apart, and a
# group is in use from when the first of them reaches it until the last has left it.
_GROUPS = ByteCache(2 << 30)
# Beside what no JSON is: Python's limits on the digits of an integer and on depth.
_NOT_JSON = (ValueError, RecursionError)
# In what Riegeli says of them: "pread() failed: Input/output error".
_SYSTEM_CALL = "() failed: "
_SURROGATE = re.compile("[\ud800-\udfff]")


def _field_of(record: Any, field: str, where: str) -> str:
    """The text in a decoded JSON record."""
    if not isinstance(record, dict):
        raise InputError(f"{where} is a {type(record).__name__}, not an object with fields.")
    if field not in record:
        raise InputError(
            f"{where} has no field {field!r}; its fields are {sorted(record)}. Set `field`."
        )
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: field {field!r} holds {type(text).__name__}, not text.")
    # JSON can spell half a surrogate pair, which no UTF-8 can.
    return _SURROGATE.sub("\ufffd", text)


def _document(record: Any, config: SourceConfig, name: str) -> Document:
    """What a decoded record holds."""
    if not config.chat:
        text = _field_of(record, config.field, name)
        prompt = _field_of(record, config.prompt, name) if config.prompt and text else ""
        return Document(name, text, prompt)
    if not isinstance(record, dict) or config.field not in record:
        _field_of(record, config.field, name)  # Says what is missing.
    messages = record[config.field]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(
            f"{name}: field {config.field!r} holds no list of messages such as "
            '{"role": "user", "content": "..."}; for text set chat=false.'
        )
    return Document(name, "", messages=tuple(messages))


def _identity(config: SourceConfig) -> str:
    """Which fields are read, and how: part of a corpus's fingerprint."""
    more = [config.prompt, config.chat] if config.chat or config.prompt else []
    return " ".join(map(str, [config.field, *more]))


class JsonLines:
    """JSONL. One pass at the start finds the lines; only their offsets are kept.

    A compressed file has no random access: that pass writes it, uncompressed, to a temporary file
    which goes with this object. For corpora where that disk space matters, use ArrayRecord or
    Parquet.
    """

    block_sizes = None

    def __init__(self, config: SourceConfig, files: Sequence[File]):
        self.label = config.path
        self._config = config
        self._names = [f.name for f in files]
        self._paths: list[epath.Path] = []
        compressed = [file.path.suffix in (".gz", ".zst") for file in files]
        scratch = make_scratch(self) if any(compressed) else None
        spans, owners = [], []
        for n, file in enumerate(files):
            path = file.path
            if compressed[n]:
                path = self._decompress(path, scratch / f"{n}.jsonl")
            self._paths.append(path)
            ends = _line_ends(path)
            starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
            spans.append(np.stack([starts, ends], 1))
            owners.append(np.full(len(ends), n, np.int32))
        self._spans = np.concatenate(spans)  # [lines, 2], bytes
        self._owners = np.concatenate(owners)
        self._first = np.searchsorted(self._owners, np.arange(len(files)))
        self.fingerprint = fingerprint_of([_identity(config), *((f.name, f.size) for f in files)])
        self.numbering = fingerprint_of([_identity(config), len(self._spans)])

    def _decompress(self, path: epath.Path, plain: epath.Path) -> epath.Path:
        try:
            with path.open("rb") as raw, plain.open("wb") as out:
                if path.suffix == ".gz":
                    shutil.copyfileobj(gzip.GzipFile(fileobj=raw), out, _CHUNK)
                else:
                    _copy_zstd(raw, out)
        except ImportError as e:
            raise InputError(f"{path} needs `zstandard`: pip install 'jaxalope[data]'") from e
        except Exception as e:
            if isinstance(e, OSError) and e.errno is not None:  # The disk's fault, not the file's.
                raise
            raise InputError(f"{path} cannot be decompressed (truncated?): {e}") from e
        return plain

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Document:
        n = int(self._owners[index])
        start, stop = map(int, self._spans[index])
        name = f"{self._names[n]}:{index - int(self._first[n]) + 1}"
        text = decode_utf8(read_range(self._paths[n], start, stop), start, self._names[n])
        if not text.strip():
            return Document(name, "")
        try:
            record = json.loads(text)
        except _NOT_JSON as e:
            raise InputError(
                f"{name} is not JSON: {e}. Mend this line, or empty it: a run goes on with an "
                "edited file that has the same number of lines. Or set the source's skip_bad."
            ) from e
        return _document(record, self._config, name)


def _copy_zstd(raw: BinaryIO, out: BinaryIO) -> None:
    """Decompresses all frames; unlike the library's own reader, a truncated one is an error."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    while data := raw.read(_CHUNK):
        while data:
            if frame.eof:
                frame = decompressor.decompressobj()
            out.write(frame.decompress(data))
            data = frame.unused_data
    if not frame.eof:
        raise EOFError("the last frame is not complete")


def _line_ends(path: epath.Path) -> np.ndarray:
    """Offsets just after each line of a file, int64; a last line may lack its line end."""
    ends, offset = [], 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + (offset + 1))
            offset += len(chunk)
    ends = np.concatenate([*ends, np.zeros(0, np.int64)])
    if offset and (len(ends) == 0 or ends[-1] != offset):
        ends = np.append(ends, offset)
    return ends.astype(np.int64)


class Parquet:
    """Parquet. A row group's text column is read at once, and kept while others need it.

    So the row group is the unit of memory and of shuffling (`block_sizes`): groups come in random
    order, and the rows in random order within theirs.
    """

    _REMEDY = (
        "Write the file anew with this row mended or empty and as many rows in every row group, or "
        "set the source's skip_bad."
    )

    def __init__(self, config: SourceConfig, files: Sequence[File]):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as e:
            raise InputError("Parquet needs `pyarrow`: pip install 'jaxalope[data]'") from e
        self._parquet, self._arrow_errors = pyarrow.parquet, pyarrow.ArrowException
        self.label = config.path
        self._config = config
        self._columns = [config.field, config.prompt] if config.prompt else [config.field]
        self._files = list(files)
        self._groups: list[tuple[int, int]] = []
        sizes = []
        for n, file in enumerate(files):
            with file.path.open("rb") as f:
                opened = self._open(f, file)
                metadata, columns = opened.metadata, list(opened.schema_arrow.names)
                for field in self._columns:
                    if field not in columns:
                        raise InputError(
                            f"{file.name} has no column {field!r}; its columns are {columns}. "
                            "Set `field`."
                        )
                for g in range(metadata.num_row_groups):
                    self._groups.append((n, g))
                    sizes.append(metadata.row_group(g).num_rows)
        self.block_sizes = sizes
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.fingerprint = fingerprint_of(
            [_identity(config), *((f.name, f.size) for f in files), *sizes]
        )
        self.numbering = fingerprint_of([_identity(config), *sizes])
        weakref.finalize(self, _GROUPS.drop, id(self))

    def _open(self, handle: Any, file: File) -> Any:
        try:
            return self._parquet.ParquetFile(handle)
        except (self._arrow_errors, OSError) as e:
            if not self._is_damage(e):
                raise
            raise InputError(f"{file.name} is not a Parquet file that can be read: {e}") from e

    def _is_damage(self, error: Exception) -> bool:
        """Whether an error is the file's fault, not that of memory, the disk or the network."""
        if isinstance(error, OSError):  # Arrow's own are plain and have no number.
            return type(error) is OSError and error.errno is None
        return not isinstance(error, MemoryError)

    def _table(self, block: int) -> Any:
        def read():
            n, group = self._groups[block]
            with self._files[n].path.open("rb") as f:
                return self._open(f, self._files[n]).read_row_group(group, columns=self._columns)

        return _GROUPS.get((id(self), block), read)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Document:
        block = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[block - 1]) if block else 0)
        n, group = self._groups[block]
        name = f"{self._files[n].name}#{group}:{row}"
        try:
            table = self._table(block)
            record = {field: table.column(field)[row].as_py() for field in self._columns}
        except UnicodeDecodeError as e:  # Writers need not check what they call a string.
            raise InputError(f"{name} is not UTF-8 ({e}). {self._REMEDY}") from e
        except (self._arrow_errors, OSError) as e:
            if not self._is_damage(e):
                raise
            reason = " ".join(str(e).split())
            raise InputError(f"{name} cannot be read ({reason}). {self._REMEDY}") from e
        return _document(record, self._config, name)


class ArrayRecord:
    """ArrayRecord of JSON objects, of `tf.train.Example`s, or (`field=""`) of plain text."""

    block_sizes = None

    def __init__(self, config: SourceConfig, files: Sequence[File]):
        import grain

        self.label = config.path
        self._config, self._field = config, config.field
        self._names = [f.name for f in files]
        self._open = grain.sources.ArrayRecordDataSource
        # The reader opens local files only: others are copied to one.
        self._paths = [os.fspath(f.path) for f in files]
        scratch = make_scratch(self) if any("://" in path for path in self._paths) else None
        for n, path in enumerate(self._paths):
            if "://" in path:
                self._paths[n] = os.fspath(scratch / f"{n}.arrayrecord")
                files[n].path.copy(self._paths[n])
        try:
            self._records = self._open(self._paths)
            self._length = len(self._records)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"source {self.label!r} cannot be read as ArrayRecord: {e}") from e
        self.fingerprint = fingerprint_of(
            [_identity(config), self._length, *((f.name, f.size) for f in files)]
        )
        self.numbering = fingerprint_of([_identity(config), self._length])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document:
        name = f"{self.label}#{index}"
        try:
            data = self._records[index]
        except (RuntimeError, ValueError) as e:
            if _SYSTEM_CALL in str(e):  # The disk's fault, not the file's.
                raise
            raise InputError(
                f"{self._place(index)} cannot be read: {e}. Write the file anew with as many "
                "records, or set the source's skip_bad."
            ) from e
        if self._field and data[:1] == b"\n":  # Key 1, a message: how every Example begins.
            return _document(parse_example(data, name), self._config, name)
        text = decode_utf8(data, 0, name)
        if not self._field:
            return Document(name, text)
        try:
            record = json.loads(text)
        except _NOT_JSON as e:
            raise InputError(
                f"{name} is neither JSON nor a tf.train.Example; if the record is the text itself, "
                f'set field="". ({e})'
            ) from e
        return _document(record, self._config, name)

    def _place(self, index: int) -> str:
        """The file of a record, and which of its records that is."""
        ends = np.cumsum([len(self._open([path])) for path in self._paths])
        n = int(np.searchsorted(ends, index, side="right"))
        return f"{self._names[n]}#{index - (int(ends[n - 1]) if n else 0)}"


class _Side:
    """One side of a hold-out by position: the last of every `period` records, or the others."""

    def __init__(self, parent: Source, split: Split, period: int):
        self.label = parent.label
        self.fingerprint = fingerprint_of([parent.fingerprint, split, period])
        self.numbering = fingerprint_of([parent.numbering, split, period])
        self._parent = parent
        self._held_out = split == "eval"
        self._period = period
        self._length = self._before(len(parent))
        self.block_sizes = None
        if parent.block_sizes is not None:
            ends = np.cumsum(parent.block_sizes)
            self.block_sizes = np.diff([0, *(self._before(int(e)) for e in ends)]).tolist()

    def _before(self, index: int) -> int:
        """How many records of this side come before record `index`."""
        held_out = index // self._period if self._period else 0
        return held_out if self._held_out else index - held_out

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document:
        if self._held_out:
            return self._parent[(index + 1) * self._period - 1]
        return self._parent[index + index // (self._period - 1) if self._period else index]


READERS: dict[str, Callable[[SourceConfig, Sequence[File]], Source]] = {
    "jsonl": JsonLines,
    "parquet": Parquet,
    "arrayrecord": ArrayRecord,
}


def open_records(
    reader: Callable[[SourceConfig, Sequence[File]], Source],
    config: SourceConfig,
    files: Sequence[File],
    split: Split,
    holdout_fraction: float,
) -> Source:
    """Opens a corpus of records with `reader`, or one side of its hold-out."""
    source = reader(config, files)
    if len(source) == 0:
        raise InputError(f"source {config.path!r} is empty: it holds no record.")
    if split == "all":
        return source
    return _Side(source, split, corpora.held_out_period(len(source), holdout_fraction))
