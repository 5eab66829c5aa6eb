"""`load_tokenizer`: a tokenizer from wherever one is."""

import json
from typing import Any

from etils import epath

from ...errors import InputError
from .base import META
from .byte import ByteTokenizer, byte_tokenizer_json
from .json_file import JsonTokenizer
from .protocol import Tokenizer
from .published import SENTENCEPIECE, TIKTOKEN, TOKENIZER_JSON, Published
from .sentencepiece import SentencePieceTokenizer
from .tiktoken import TiktokenTokenizer, is_tiktoken


def load_tokenizer(spec: epath.PathLike) -> Tokenizer:
    """Opens a tokenizer.

    Args:
      spec: `"bytes"`; a `tokenizer.json`, a SentencePiece `.model` or a `tiktoken.model` file; or a
        directory that holds one of them (the first of these, if several), or what `save` wrote. Any
        `etils.epath` path.

    Raises:
      InputError: nothing of the kind is there, or it cannot be read.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = epath.Path(spec).expanduser()
    if not path.exists():
        raise InputError(
            f'tokenizer {str(spec)!r}: no such file or directory. Use "bytes", a tokenizer.json, a '
            "SentencePiece .model, a tiktoken.model, or a directory that holds one of them."
        )
    try:
        return _from_directory(path) if path.is_dir() else _from_file(path)
    except (InputError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"tokenizer {str(spec)!r}: {e}") from e


def _from_file(path: epath.Path) -> Tokenizer:
    published = Published.beside(path.parent, vocabularies=False)
    if path.suffix == ".json":
        return _json(path.read_bytes(), published)
    if path.suffix == ".model":
        content = path.read_bytes()
        if path.name == TIKTOKEN or is_tiktoken(content):
            return TiktokenTokenizer(content, published)
        return SentencePieceTokenizer(content, published)
    raise InputError(f"expected a .json or a .model file, not {path.suffix!r}.")


def _from_directory(path: epath.Path) -> Tokenizer:
    published = Published.beside(path)
    if (path / META).exists():
        return _saved(json.loads((path / META).read_text()), published)
    files = published.files
    if TOKENIZER_JSON in files:
        return _json(files[TOKENIZER_JSON], published.without(TOKENIZER_JSON))
    if SENTENCEPIECE in files:
        content, published = files[SENTENCEPIECE], published.without(SENTENCEPIECE)
        if not is_tiktoken(content):
            return SentencePieceTokenizer(content, published)
        raise InputError(
            f"its {SENTENCEPIECE} is a list of ranks, which does not say how texts are cut into "
            "words; give TiktokenTokenizer(..., pattern=...) the one in that model's code."
        )
    if TIKTOKEN in files:
        return TiktokenTokenizer(files[TIKTOKEN], published.without(TIKTOKEN))
    raise InputError(
        f"the directory holds neither {TOKENIZER_JSON} nor {SENTENCEPIECE} nor {TIKTOKEN}."
    )


def _json(content: bytes, published: Published) -> Tokenizer:
    # The byte tokenizer's published form comes back as what it was.
    if content == byte_tokenizer_json():
        return ByteTokenizer(published)
    return JsonTokenizer(content, published=published)


def _saved(meta: dict[str, Any], published: Published) -> Tokenizer:
    def split(name: str) -> tuple[bytes, Published]:
        if name not in published.files:
            raise InputError(f"{META} speaks of a {name}, which is not there.")
        return published.files[name], published.without(name)

    match meta:
        case {"kind": "bytes"}:
            return ByteTokenizer(published)
        case {"kind": "tokenizer.json"}:
            content, published = split(TOKENIZER_JSON)
            return JsonTokenizer(content, meta.get("special"), published)
        case {"kind": "sentencepiece"}:
            return SentencePieceTokenizer(*split(SENTENCEPIECE))
        case {"kind": "tiktoken"}:
            return TiktokenTokenizer(*split(TIKTOKEN), meta.get("pattern"))
        case _:
            raise InputError(f"{META} names an unknown kind {meta.get('kind')!r}.")
