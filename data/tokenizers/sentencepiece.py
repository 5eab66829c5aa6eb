"""A SentencePiece model."""

import re
from collections.abc import Sequence

from ...errors import InputError
from .base import Carrier, check_ids, fingerprint, split_at_names
from .published import SENTENCEPIECE, Published

# Classes of `transformers` that begin texts with BOS where no configuration says otherwise.
_BEGIN = ("CodeLlamaTokenizer", "GemmaTokenizer", "LlamaTokenizer")


class SentencePieceTokenizer(Carrier):
    """A SentencePiece `.model` file (needs the extra `data`)."""

    kind = "sentencepiece"
    main = SENTENCEPIECE

    def __init__(self, serialized: bytes, published: Published | None = None):
        """Args: the contents of the `.model` file, and the files that were beside it.

        Raises:
          InputError: it is none, or the files beside it add tokens that it does not have.
        """
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
        self.published = published or Published()
        self.vocab_size = self._processor.vocab_size()
        self._check_added()

        own = {"bos_id": self._processor.bos_id(), "eos_id": self._processor.eos_id()}
        own |= {"pad_id": self._processor.pad_id()}
        own = {role: None if i < 0 else i for role, i in own.items()}
        special = self.published.special_ids(self._id, own)
        self.bos_id, self.eos_id, self.pad_id = (special[role] for role in own)
        differ = [] if special == own else [repr(sorted(special.items())).encode()]
        self.fingerprint = fingerprint(b"sentencepiece", serialized, *differ)

    def encode(self, text: str) -> list[int]:
        """Token ids, without BOS or EOS."""
        return self._processor.encode(text)

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, where the names of control tokens stand for these tokens.

        What stands between two of them is encoded as a text of its own.
        """
        control = {
            self._processor.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self._processor.is_control(i)
        }
        return split_at_names(text, control, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """Text; control tokens have none."""
        return self._processor.decode(check_ids(ids, self.vocab_size))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 of `decode`; bytes at the end that are no whole code point yet stay as they are."""
        ids = check_ids(ids, self.vocab_size)
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

    def _check_added(self) -> None:
        for name, (i, _) in self.published.added_tokens.items():
            if self._id(name) != i:
                raise InputError(
                    f"{name!r} is added to {SENTENCEPIECE} as id {i}, which the model itself does "
                    "not have; save the tokenizer as a tokenizer.json (transformers' "
                    "save_pretrained does) and load that"
                )

    def _id(self, piece: str) -> int | None:
        i = self._processor.piece_to_id(piece)
        return i if self._processor.id_to_piece(i) == piece else None

    def _name(self, i):
        return self._processor.id_to_piece(i)

    def _adds_bos(self):
        named = str(self.published.config.get("tokenizer_class", ""))
        return named.removesuffix("Fast") in _BEGIN

    def _serialized_bytes(self):
        return self._serialized
