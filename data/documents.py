"""What a corpus is made of: files, and documents that are reached by number."""

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from etils import epath

from ..errors import InputError

Split = Literal["train", "eval", "all"]


class Document(NamedTuple):
    """A document: a name to tell it by (file, line or row) and its text, which may be empty.

    Attributes:
      name: to tell it by.
      text: what is learnt; empty for a conversation.
      prompt: what is read before it and not learnt.
      messages: a conversation instead, whose last message is learnt.
    """

    name: str
    text: str
    prompt: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()


class Source(Protocol):
    """Random access to the documents of one corpus.

    Attributes:
      label: the corpus, for messages.
      fingerprint: changes when the corpus changes (its files, their sizes, its split).
      numbering: changes when a document's number would stand for another document, and not when
        documents are edited.
      block_sizes: numbers of consecutive documents that are cheap to read together, or None where
        any order costs the same.
    """

    label: str
    fingerprint: str
    numbering: str
    block_sizes: Sequence[int] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class File(NamedTuple):
    """A file of a corpus: its name there, where it is, and its size in bytes."""

    name: str
    path: epath.Path
    size: int


def list_files(spec: str) -> list[File]:
    """The non-empty files of a path, a directory (without hidden ones) or a glob, by name.

    Raises:
      InputError: nothing is there, or only empty files.
    """
    path = epath.Path(spec).expanduser()
    found: dict[str, epath.Path] = {}

    def walk(directory: epath.Path, prefix: str, pattern: str | None) -> None:
        for child in directory.iterdir():
            name = prefix + child.name
            if child.name.startswith("."):
                continue
            if child.is_dir():
                walk(child, name + "/", pattern)
            elif pattern is None or fnmatch.fnmatchcase(name, pattern):
                found[name] = child

    if path.exists():
        if path.is_dir():
            walk(path, "", None)
        else:
            found[path.name] = path
    elif any(c in spec for c in "*?["):
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
        base, pattern = epath.Path(*parts[:first]), "/".join(parts[first:])
        if base.exists():
            if "**" in pattern:  # `*` of fnmatch crosses directories already.
                walk(base, "", pattern.replace("**/", ""))
            else:
                depth = len(base.parts)
                for child in base.glob(pattern):
                    if not child.is_dir():
                        found["/".join(child.parts[depth:])] = child
        if not found:
            raise InputError(f"source {spec!r}: no file matches this pattern.")
    else:
        raise InputError(
            f'source {spec!r}: no such file or directory. Use a path, a glob, or "stdlib".'
        )
    files = [File(name, found[name], found[name].stat().length) for name in sorted(found)]
    files = [f for f in files if f.size > 0]
    if not files:
        raise InputError(f"source {spec!r} is empty: it holds no file with anything in it.")
    return files


def read_range(path: epath.Path, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file."""
    with path.open("rb") as f:
        f.seek(start)
        return f.read(stop - start)


def decode_utf8(data: bytes, start: int, where: str) -> str:
    """`data`, found at byte `start` of `where`, as text; else `InputError` names the byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{where} is not UTF-8: byte {start + e.start} is 0x{data[e.start]:02x}. Convert the "
            "file (iconv -f latin1 -t utf-8, if it is Latin-1), leave it out of the source before "
            "the first run, or set the source's skip_bad to pass over such documents."
        ) from e


def fingerprint_of(parts: Iterable[object]) -> str:
    """16 hexadecimal digits of what `parts` print as."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
