"""What training and sampling ask of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from etils import epath


class Tokenizer(Protocol):
    """What training and sampling need of a tokenizer.

    Attributes:
      vocab_size: number of ids; every id is below it.
      bos_id: begins a text, or None. `encode` never adds it.
      eos_id: ends a text, or None. `encode` never adds it.
      pad_id: fills, or None.
      fingerprint: 16 hexadecimal digits that differ between different tokenizers.
      add_bos: whether its model reads texts that begin with BOS, as its publisher says.
      special_names: how special tokens are written, by role: `{"bos_token": "<s>", ...}`.
      chat_templates: jinja2 sources by name; the usual one is `"default"`. Empty if there is none.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str

    @property
    def add_bos(self) -> bool: ...  # noqa: D102

    @property
    def special_names(self) -> Mapping[str, str]: ...  # noqa: D102

    @property
    def chat_templates(self) -> Mapping[str, str]: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""
        ...

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of `text` in which special tokens are written by name, as in a rendered chat.

        Nothing is added; where `encode` reads these names as special tokens too, it is the same.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out; `InputError` for an id outside the vocabulary."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 of the text of `ids`.

        Where tokens are pieces of bytes the result may begin or end inside a code point (so a
        stream of tokens can be printed code point by code point); elsewhere it is `decode(ids)`
        encoded.
        """
        ...

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each id adds to a text that has begun, `vocab_size` of them.

        None for ids that add none: special tokens, gaps. The mark of a word's beginning is a space.

        Raises:
          InputError: what an id adds depends on its neighbours (WordPiece, for one).
        """
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Writes what `load_tokenizer(directory)` needs. Creates the directory.

        What was read from files is written byte for byte, and so is what lay beside them.
        """
        ...

    def saved_files(self) -> dict[str, bytes]:
        """What `save` writes, by the path in its directory."""
        ...

    def files(self) -> dict[str, bytes]:
        """The published form, by the path in a model's directory, as `transformers` reads it."""
        ...
