"""The tokenizer that needs no file: a text's UTF-8, byte by byte."""

import functools
import json
from collections.abc import Sequence

from .base import Carrier, check_ids, fingerprint, split_at_names
from .byte_level import byte_alphabet
from .published import CONFIG, TOKENIZER_JSON, Published, config_file

_NAMES = {"<|pad|>": 256, "<|bos|>": 257, "<|eos|>": 258}


class ByteTokenizer(Carrier):
    """The 256 bytes of UTF-8, then pad (256), BOS (257), EOS (258); ids up to 319 are reserved.

    The reserve keeps the vocabulary a multiple of 64, which shards over any usual mesh, and leaves
    room for special tokens (a mask, markers) without another vocabulary size.
    """

    kind = "bytes"
    main = TOKENIZER_JSON
    vocab_size = 320
    pad_id = 256
    bos_id = 257
    eos_id = 258
    fingerprint = fingerprint(b"bytes", b"320")

    def __init__(self, published: Published | None = None):
        """Args: `published`, files that it carries (a chat template, for one)."""
        self.published = published or Published()

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode("utf-8", "replace"))

    def encode_marked(self, text: str) -> list[int]:
        """The bytes of `text`, where `<|bos|>`, `<|eos|>` and `<|pad|>` are special tokens."""
        return split_at_names(text, _NAMES, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes of `ids` as text; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`; ids from 256 on have none."""
        return bytes(i for i in check_ids(ids, self.vocab_size) if i < 256)

    def token_bytes(self) -> list[bytes | None]:
        """Each byte; None from id 256 on."""
        return [bytes([i]) if i < 256 else None for i in range(self.vocab_size)]

    def files(self) -> dict[str, bytes]:
        """A `tokenizer.json` that encodes alike, and its configuration.

        It cannot help one difference: `tokenizers` takes the names of the special tokens, where
        they stand in a text, for these tokens. `transformers` is told not to.
        """
        names = {f"{name[2:-2]}_token": name for name in _NAMES}
        config = config_file(names, split_special_tokens=True)
        return {CONFIG: config, **self.published.files, TOKENIZER_JSON: byte_tokenizer_json()}

    def _saved(self) -> dict[str, bytes]:
        return dict(self.published.files)

    def _name(self, i):
        return next(name for name, own in _NAMES.items() if own == i)


@functools.cache
def byte_tokenizer_json() -> bytes:
    """The byte tokenizer as a file of the `tokenizers` library; always the same bytes."""
    names = [*_NAMES, *(f"<|reserved_{i}|>" for i in range(259, ByteTokenizer.vocab_size))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": 256 + i, "content": n, **flags, "special": True} for i, n in enumerate(names)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": byte_alphabet(),
            "merges": [],
        },
    }
    return (json.dumps(spec, ensure_ascii=False, indent=2) + "\n").encode()
