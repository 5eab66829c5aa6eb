"""The embedded corpus, and how a corpus is divided into training and held-out documents.

The default corpus is the source code of the running Python's own standard library: real text that
is on every machine and needs no download.
"""

import hashlib
import sysconfig
from collections.abc import Sequence

from etils import epath

from ..errors import InputError

# Tests and their data would be half of it; `encodings` is tables of code points; `pydoc_data` is
# one generated file; `lib2to3` holds grammars and test cases for an old language.
_EXCLUDED_DIRECTORIES = frozenset(
    ("test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "__pycache__")
)
_EXCLUDED_PACKAGES = ("site-packages", "dist-packages", "config-", ".")
# Written when this Python was built or installed: they differ from machine to machine.
_EXCLUDED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def stdlib_root() -> epath.Path:
    """The directory that holds the running Python's standard library."""
    return epath.Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(root: epath.Path | None = None) -> list[tuple[str, epath.Path]]:
    """The embedded corpus: `(name relative to root, path)` of its source files, sorted by name.

    Args:
      root: a standard library; by default the running Python's.

    Raises:
      InputError: this Python comes without its library's source (some embedded builds do).
    """
    root = stdlib_root() if root is None else root
    found = []

    def visit(directory: epath.Path, prefix: str) -> None:
        for path in directory.iterdir():
            name = path.name
            if path.is_dir():
                if name not in _EXCLUDED_DIRECTORIES and not name.startswith(_EXCLUDED_PACKAGES):
                    visit(path, f"{prefix}{name}/")
            elif name.endswith(".py") and not name.startswith(_EXCLUDED_PREFIXES):
                found.append((prefix + name, path))

    visit(root, "")
    if not found:
        raise InputError(
            f"the embedded corpus is empty: {root} holds no Python source. Name a corpus of your "
            "own, or use a Python that comes with its library's source."
        )
    return sorted(found)


def held_out_names(names: Sequence[str], fraction: float) -> set[str]:
    """The names whose documents are held out: those whose hash falls below `fraction`.

    A name's side depends on the name alone, so it is the same on every machine and in every version
    of the corpus. The one exception keeps a small corpus usable: with two names or more and
    `fraction` > 0 at least one is held out (the one with the lowest hash), and at least one is not.
    """
    unique = sorted(set(names))
    if fraction <= 0 or len(unique) < 2:
        return set()

    def place(name):
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64

    ranked = sorted(unique, key=place)
    count = sum(place(name) < fraction for name in ranked)
    return set(ranked[: min(max(count, 1), len(ranked) - 1)])


def held_out_period(count: int, fraction: float) -> int:
    """Records are held out by position: the last of every so many. 0: none is.

    Used where a document has no name (JSONL, Parquet, ArrayRecord): both halves stay addressable by
    arithmetic, without a list of them.
    """
    if fraction <= 0 or count < 2:
        return 0
    return min(max(round(1 / fraction), 2), count)
