"""What all tokenizers share: checks of ids, and how they are written down."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from ...errors import InputError
from .published import Published, roles

META = "tokenizer_meta.json"


def fingerprint(*parts: bytes) -> str:
    """16 hexadecimal digits of these parts, in this order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """`ids` as plain integers.

    Raises:
      InputError: one is outside the vocabulary; names it and its place.
    """
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise InputError(
                f"token id {i} at position {position} is outside the vocabulary of {vocab_size} "
                "ids: these ids come from another tokenizer, or from the padding of a model's "
                "vocabulary."
            )
    return ids


def split_at_names(
    text: str, names: Mapping[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Token ids of `text`: of each name of `names` its id, of what stands between them `encode`."""
    if not names:
        return encode(text)
    longest_first = sorted(names, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ids = []
    for place, part in enumerate(parts):
        if part:
            ids += [names[part]] if place % 2 else encode(part)
    return ids


class Carrier:
    """A tokenizer with what was published beside it; see the protocol for the doors.

    Attributes:
      published: the files beside the vocabulary.
    """

    kind: ClassVar[str]
    # Under which the vocabulary is published.
    main: ClassVar[str]

    published: Published
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @property
    def add_bos(self) -> bool:
        """What `add_bos_token` says, or else what the vocabulary's file does by itself."""
        said = self.published.add_bos
        return self.bos_id is not None and (self._adds_bos() if said is None else said)

    @property
    def special_names(self) -> dict[str, str]:
        """How special tokens are written, by role."""
        ids = (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id))
        return roles(
            self.published.names, ((r, None if i is None else self._name(i)) for r, i in ids)
        )

    @property
    def chat_templates(self) -> dict[str, str]:
        """jinja2 sources by name."""
        return self.published.chat_templates

    def save(self, directory: epath.PathLike) -> None:
        """Writes `saved_files`. Creates the directory."""
        directory = epath.Path(directory)
        for name, content in self.saved_files().items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def saved_files(self) -> dict[str, bytes]:
        """The vocabulary and what was beside it, unchanged, and what we know of it."""
        meta = json.dumps({"kind": self.kind, **self._meta()}, indent=1) + "\n"
        return {**self._saved(), META: meta.encode()}

    def files(self) -> dict[str, bytes]:
        """The files as they were published."""
        return self._saved()

    def _saved(self) -> dict[str, bytes]:
        return {**self.published.files, self.main: self._serialized_bytes()}

    def _meta(self) -> dict[str, Any]:
        return {}

    def _adds_bos(self) -> bool:
        return False

    def _name(self, i: int) -> str | None:
        raise NotImplementedError

    def _serialized_bytes(self) -> bytes:
        raise NotImplementedError
