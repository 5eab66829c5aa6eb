"""`tf.train.Example` records, which most published ArrayRecord files hold, without TensorFlow."""

from typing import Any

from ..errors import InputError
from .documents import decode_utf8


def _wire_fields(data: bytes) -> list[tuple[int, bytes]]:
    """The length-delimited fields of a protocol buffer message: `(number, contents)`."""
    fields, at = [], 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(data):
        key = varint()
        if key & 7 != 2:
            raise ValueError(f"wire type {key & 7}")
        size = varint()
        if at + size > len(data):
            raise ValueError("truncated")
        fields.append((key >> 3, data[at : at + size]))
        at += size
    return fields


def parse_example(data: bytes, where: str) -> dict[str, Any]:
    """The features of a `tf.train.Example`; those that are one byte string as text.

    Example{1: Features{1: map<string 1, Feature 2>}}, Feature{1: BytesList{1: repeated bytes}}
    (tensorflow/core/example/{example,feature}.proto).
    """
    features: dict[str, Any] = {}
    try:
        for _, entries in _wire_fields(data):
            for _, entry in _wire_fields(entries):
                parts = dict(_wire_fields(entry))
                kinds = _wire_fields(parts.get(2, b""))
                values = _wire_fields(kinds[0][1]) if kinds and kinds[0][0] == 1 else []
                name = parts.get(1, b"").decode()
                features[name] = values[0][1] if len(values) == 1 else [v for _, v in values]
    except (ValueError, IndexError) as e:
        raise InputError(f"{where} is not a tf.train.Example that can be read: {e}") from e
    return {
        name: decode_utf8(v, 0, f"{where}, feature {name!r},") if isinstance(v, bytes) else v
        for name, v in features.items()
    }
