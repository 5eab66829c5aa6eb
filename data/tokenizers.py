"""Text to token ids and back: bytes, any `tokenizer.json`, SentencePiece.

All three save themselves into a directory that `load_tokenizer` reads back, so that a workdir or a
checkpoint carries its own tokenizer.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tokenizers as hf
from etils import epath

from ..errors import InputError

_META = "tokenizer_meta.json"
_TOKENIZER_JSON = "tokenizer.json"
_SENTENCEPIECE = "tokenizer.model"


class Tokenizer(Protocol):
    """What training and sampling need of a tokenizer.

    Attributes:
      vocab_size: number of ids; every id is below it.
      bos_id: begins a text, or None. `encode` never adds it.
      eos_id: ends a text, or None. `encode` never adds it.
      pad_id: fills, or None.
      fingerprint: 16 hexadecimal digits that differ between different tokenizers.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""
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
        """Writes what `load_tokenizer(directory)` needs. Creates the directory."""
        ...


def _fingerprint(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise InputError(
                f"token id {i} at position {position} is outside the vocabulary of {vocab_size} "
                "ids: these ids come from another tokenizer, or from the padding of a model's "
                "vocabulary."
            )
    return ids


def _save_meta(directory: epath.PathLike, meta: dict[str, Any]) -> epath.Path:
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _META).write_text(json.dumps(meta, indent=1) + "\n")
    return directory


class ByteTokenizer:
    """The 256 bytes of UTF-8, then pad (256), BOS (257), EOS (258); ids up to 319 are reserved.

    The reserve keeps the vocabulary a multiple of 64, which shards over any usual mesh, and leaves
    room for special tokens (a mask, markers) without another vocabulary size.
    """

    vocab_size = 320
    pad_id = 256
    bos_id = 257
    eos_id = 258
    fingerprint = _fingerprint(b"bytes", b"320")

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes of `ids` as text; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`; ids from 256 on have none."""
        return bytes(i for i in _check_ids(ids, self.vocab_size) if i < 256)

    def token_bytes(self) -> list[bytes | None]:
        """Each byte; None from id 256 on."""
        return [bytes([i]) if i < 256 else None for i in range(self.vocab_size)]

    def save(self, directory: epath.PathLike) -> None:
        """Writes one small JSON file."""
        _save_meta(directory, {"kind": "bytes"})


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for bytes (GPT-2's table), inverted."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(kept)]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(moved)}


# Names under which published files keep these tokens, where no tokenizer_config.json says it.
_USUAL_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|bos|>", "<|startoftext|>", "[BOS]")
_USUAL_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[EOS]")
_USUAL_PAD = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]")


class JsonTokenizer:
    """Any `tokenizer.json` of the `tokenizers` library.

    BOS, EOS and padding come from a `tokenizer_config.json` beside the file if there is one, else
    from the usual names among its special tokens.
    """

    def __init__(self, serialized: str, special: dict[str, int | None] | None = None):
        """Args: the contents of a `tokenizer.json`; `special`, the `{bos,eos,pad}_id` if known."""
        try:
            self._tokenizer = hf.Tokenizer.from_str(serialized)
        except Exception as e:  # The library raises bare Exception.
            raise InputError(f"this is not a tokenizer.json that can be read: {e}") from e
        # Files are often saved with the settings of their last training batch.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._serialized = serialized
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps: the highest one, not their number, is what an embedding must hold.
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if special is None:
            names = {t.content for t in self._tokenizer.get_added_tokens_decoder().values()}

            def find(usual):
                return next((vocab[name] for name in usual if name in names), None)

            special = {
                "bos_id": find(_USUAL_BOS),
                "eos_id": find(_USUAL_EOS),
                "pad_id": find(_USUAL_PAD),
            }
        self.bos_id = special["bos_id"]
        self.eos_id = special["eos_id"]
        self.pad_id = special["pad_id"]
        self.fingerprint = _fingerprint(
            b"tokenizer.json", serialized.encode(), repr(sorted(special.items())).encode()
        )
        self._alphabet = _byte_alphabet() if _is_byte_level(json.loads(serialized)) else None

    @classmethod
    def from_file(cls, path: epath.Path) -> "JsonTokenizer":
        """Reads `path` and the `tokenizer_config.json` beside it, if there."""
        serialized = path.read_text()
        beside = path.parent / "tokenizer_config.json"
        if not beside.exists():
            return cls(serialized)
        tokenizer = cls(serialized)
        config = json.loads(beside.read_text())

        def find(name, otherwise):
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            found = tokenizer._tokenizer.token_to_id(value) if value else None
            return otherwise if found is None else found

        return cls(
            serialized,
            {
                "bos_id": find("bos_token", tokenizer.bos_id),
                "eos_id": find("eos_token", tokenizer.eos_id),
                "pad_id": find("pad_token", tokenizer.pad_id),
            },
        )

    def encode(self, text: str) -> list[int]:
        """Token ids, without those that a post-processor would add."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text, without special tokens."""
        return self._tokenizer.decode(_check_ids(ids, self.vocab_size), skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Exact bytes for a byte-level vocabulary; else the UTF-8 of `decode`."""
        if self._alphabet is None:
            return self.decode(ids).encode()
        added = self._tokenizer.get_added_tokens_decoder()
        out = bytearray()
        for i in _check_ids(ids, self.vocab_size):
            if i in added:
                out += b"" if added[i].special else added[i].content.encode()
            else:
                token = self._tokenizer.id_to_token(i) or ""
                out += bytes(self._alphabet[c] for c in token)
        return bytes(out)

    def token_bytes(self) -> list[bytes | None]:
        """Of a byte-level vocabulary, or of one that the decoder joins without a look around."""
        spec = json.loads(self._serialized)
        added = self._tokenizer.get_added_tokens_decoder()
        unknown = spec["model"].get("unk_token")
        to_bytes = _piece_decoder(spec, self._alphabet)
        out: list[bytes | None] = [None] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                out[i] = None if added[i].special else added[i].content.encode()
            elif token != unknown:
                out[i] = to_bytes(token)
        return out

    def save(self, directory: epath.PathLike) -> None:
        """Writes the `tokenizer.json` unchanged, and the special ids."""
        special = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        directory = _save_meta(directory, {"kind": "tokenizer.json", "special": special})
        (directory / _TOKENIZER_JSON).write_text(self._serialized)


def _is_byte_level(spec: dict[str, Any]) -> bool:
    decoder = spec.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return len(parts) == 1 and parts[0].get("type") == "ByteLevel"


def _piece_decoder(spec: dict[str, Any], alphabet: dict[str, int] | None) -> Callable[[str], bytes]:
    """From a token as the vocabulary has it to its bytes, by a `tokenizer.json`'s `decoder`."""
    if alphabet is not None:
        # The library takes a token with a character from outside the alphabet as plain text.
        return lambda token: (
            bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
        )
    decoder = spec.get("decoder") or {"type": None}
    replaced, byte_fallback, fused = [], False, False
    for part in decoder.get("decoders", [decoder]):
        match part:
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                replaced.append((old, new))
            case {"type": "Metaspace", "replacement": mark}:
                # Takes a space away too, but at the beginning of a text only.
                replaced.append((mark, " "))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip"} if fused:
                pass  # The ends of the whole text.
            case _:
                raise InputError(
                    f"tokenizer.json: what a token writes is not known from the token alone where "
                    f"the decoder has a part {part['type']!r}; use a byte-level or "
                    "SentencePiece-like tokenizer"
                )

    def decode(token: str) -> bytes:
        if byte_fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return decode


class SentencePieceTokenizer:
    """A SentencePiece `.model` file (needs the extra `data`)."""

    def __init__(self, serialized: bytes):
        """Args: the contents of the `.model` file."""
        try:
            import sentencepiece
        except ImportError as e:
            raise InputError(
                "a SentencePiece model needs `sentencepiece`: pip install 'jaxalope[data]'"
            ) from e
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except RuntimeError as e:
            raise InputError(f"this is not a SentencePiece model that can be read: {e}") from e
        self._serialized = serialized
        self.vocab_size = self._processor.vocab_size()

        def known(i):
            return i if i >= 0 else None

        self.bos_id = known(self._processor.bos_id())
        self.eos_id = known(self._processor.eos_id())
        self.pad_id = known(self._processor.pad_id())
        self.fingerprint = _fingerprint(b"sentencepiece", serialized)

    def encode(self, text: str) -> list[int]:
        """Token ids, without BOS or EOS."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text; control tokens have none."""
        return self._processor.decode(_check_ids(ids, self.vocab_size))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 of `decode`; bytes at the end that are no whole code point yet stay as they are."""
        ids = _check_ids(ids, self.vocab_size)
        # The library prints U+FFFD for the bytes of an unfinished code point: decode those
        # ourselves.
        end = len(ids)
        while end and self._processor.is_byte(ids[end - 1]):
            end -= 1
        tail = bytes(
            int(re.fullmatch("<0x(..)>", self._processor.id_to_piece(i))[1], 16) for i in ids[end:]
        )
        return self._processor.decode(ids[:end]).encode() + tail

    def token_bytes(self) -> list[bytes | None]:
        """Pieces with U+2581 as a space, and bytes; None for control, unknown and unused ids."""
        out: list[bytes | None] = []
        for i in range(self.vocab_size):
            piece, known = self._processor.id_to_piece(i), self._processor
            if known.is_control(i) or known.is_unknown(i) or known.is_unused(i):
                out.append(None)
            elif known.is_byte(i):
                out.append(bytes([int(piece[3:5], 16)]))
            else:
                out.append(piece.replace("\u2581", " ").encode())
        return out

    def save(self, directory: epath.PathLike) -> None:
        """Writes the model unchanged."""
        directory = _save_meta(directory, {"kind": "sentencepiece"})
        (directory / _SENTENCEPIECE).write_bytes(self._serialized)


def load_tokenizer(spec: epath.PathLike) -> Tokenizer:
    """Opens a tokenizer.

    Args:
      spec: `"bytes"`; a `tokenizer.json` or SentencePiece `.model` file; or a directory that holds
        one of them, or what `save` wrote. Any `etils.epath` path.

    Raises:
      InputError: nothing of the kind is there, or it cannot be read.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = epath.Path(spec).expanduser()
    if not path.exists():
        raise InputError(
            f'tokenizer {str(spec)!r}: no such file or directory. Use "bytes", a tokenizer.json, a '
            "SentencePiece .model, or a directory that holds one of them."
        )
    try:
        if not path.is_dir():
            if path.suffix == ".json":
                return JsonTokenizer.from_file(path)
            if path.suffix == ".model":
                return SentencePieceTokenizer(path.read_bytes())
            raise InputError(f"expected a .json or a .model file, not {path.suffix!r}.")
        if (path / _META).exists():
            meta = json.loads((path / _META).read_text())
            if meta["kind"] == "bytes":
                return ByteTokenizer()
            if meta["kind"] == "tokenizer.json":
                return JsonTokenizer((path / _TOKENIZER_JSON).read_text(), meta["special"])
            if meta["kind"] == "sentencepiece":
                return SentencePieceTokenizer((path / _SENTENCEPIECE).read_bytes())
            raise InputError(f"{_META} names an unknown kind {meta['kind']!r}.")
        if (path / _TOKENIZER_JSON).exists():
            return JsonTokenizer.from_file(path / _TOKENIZER_JSON)
        if (path / _SENTENCEPIECE).exists():
            return SentencePieceTokenizer((path / _SENTENCEPIECE).read_bytes())
        raise InputError(f"the directory holds neither {_TOKENIZER_JSON} nor {_SENTENCEPIECE}.")
    except (InputError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"tokenizer {str(spec)!r}: {e}") from e
