"""How byte-level vocabularies write bytes, and what a token of a `tokenizer.json` writes."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import InputError


def byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for bytes (GPT-2's table), inverted."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(kept)]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(moved)}


def is_byte_level(spec: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json`'s decoder turns stand-ins into bytes, and nothing else."""
    decoder = spec.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return len(parts) == 1 and parts[0].get("type") == "ByteLevel"


def piece_decoder(
    spec: Mapping[str, Any], alphabet: Mapping[str, int] | None
) -> Callable[[str], bytes]:
    """From a token as the vocabulary has it to its bytes, by a `tokenizer.json`'s `decoder`.

    Raises:
      InputError: the decoder looks at a token's neighbours.
    """
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
