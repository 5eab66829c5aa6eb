"""Any pipeline of the `tokenizers` library."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers as hf

from ...errors import InputError
from .base import Carrier, check_ids, fingerprint
from .byte_level import byte_alphabet, is_byte_level, piece_decoder
from .published import CONFIG, TOKENIZER_JSON, Published, config_file

# Names under which published files keep these tokens, where no tokenizer_config.json says it.
_USUAL = {
    "bos_id": ("<s>", "<bos>", "<|begin_of_text|>", "<|bos|>", "<|startoftext|>", "[BOS]"),
    "eos_id": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[EOS]"),
    "pad_id": ("<pad>", "<|pad|>", "<|padding|>", "[PAD]"),
}


class Pipeline(Carrier):
    """A tokenizer whose work a pipeline of the `tokenizers` library does."""

    def __init__(
        self, pipeline: hf.Tokenizer, spec: Mapping[str, Any], published: Published | None
    ):
        """Args: `spec`, the `decoder` and `model` of its file, vocabulary and merges aside."""
        # Files are often saved with the settings of their last training batch.
        pipeline.no_truncation()
        pipeline.no_padding()
        self._tokenizer = pipeline
        self._spec = spec
        self._alphabet = byte_alphabet() if is_byte_level(spec) else None
        self.published = published or Published()
        # Ids may have gaps: the highest one, not their number, is what an embedding must hold.
        vocab = pipeline.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids, without those that a post-processor would add."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, which knows the names of special tokens."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text, without special tokens."""
        return self._tokenizer.decode(check_ids(ids, self.vocab_size), skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Exact bytes for a byte-level vocabulary; else the UTF-8 of `decode`."""
        if self._alphabet is None:
            return self.decode(ids).encode()
        added = self._tokenizer.get_added_tokens_decoder()
        out = bytearray()
        for i in check_ids(ids, self.vocab_size):
            if i in added:
                out += b"" if added[i].special else added[i].content.encode()
            else:
                token = self._tokenizer.id_to_token(i) or ""
                out += bytes(self._alphabet[c] for c in token)
        return bytes(out)

    def token_bytes(self) -> list[bytes | None]:
        """Of a byte-level vocabulary, or of one that the decoder joins without a look around."""
        added = self._tokenizer.get_added_tokens_decoder()
        unknown = self._spec["model"].get("unk_token")
        to_bytes = piece_decoder(self._spec, self._alphabet)
        out: list[bytes | None] = [None] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                out[i] = None if added[i].special else added[i].content.encode()
            elif token != unknown:
                out[i] = to_bytes(token)
        return out

    def _name(self, i):
        return self._tokenizer.id_to_token(i)


class JsonTokenizer(Pipeline):
    """Any `tokenizer.json` of the `tokenizers` library.

    BOS, EOS and padding are what the files beside it say, else the usual names among its special
    tokens.
    """

    kind = "tokenizer.json"
    main = TOKENIZER_JSON

    def __init__(
        self,
        serialized: str | bytes,
        special: Mapping[str, int | None] | None = None,
        published: Published | None = None,
    ):
        """Args: what a `tokenizer.json` holds; `{bos,eos,pad}_id` if known; files beside it."""
        self._serialized = serialized.encode() if isinstance(serialized, str) else serialized
        try:
            pipeline = hf.Tokenizer.from_buffer(self._serialized)
        except Exception as e:  # The library raises bare Exception.
            raise InputError(f"this is not a tokenizer.json that can be read: {e}") from e
        spec = json.loads(self._serialized)
        model = {name: value for name, value in spec["model"].items() if name == "unk_token"}
        super().__init__(pipeline, {"decoder": spec.get("decoder"), "model": model}, published)
        # Whether they are ours to write down: nothing that was published says them.
        self._given = None if special is None else dict(special)
        if special is None:
            special = self.published.special_ids(pipeline.token_to_id, self._usual())
        self.bos_id, self.eos_id, self.pad_id = (special[f"{x}_id"] for x in ("bos", "eos", "pad"))
        self.fingerprint = fingerprint(
            b"tokenizer.json", self._serialized, repr(sorted(special.items())).encode()
        )

    def files(self) -> dict[str, bytes]:
        """As published; a configuration says the special tokens where nothing published does."""
        saved = self._saved()
        if self._given is not None and CONFIG not in saved:
            names = {
                role.replace("_id", "_token"): self._name(i)
                for role, i in self._given.items()
                if i is not None
            }
            saved[CONFIG] = config_file(names)
        return saved

    def _usual(self) -> dict[str, int | None]:
        own = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        return {
            role: next((own[name] for name in names if name in own), None)
            for role, names in _USUAL.items()
        }

    def _adds_bos(self):
        # What the file's own post-processor does.
        return self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    def _meta(self):
        return {} if self._given is None else {"special": self._given}

    def _serialized_bytes(self):
        return self._serialized
