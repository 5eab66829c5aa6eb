"""Text to token ids and back: bytes, any `tokenizer.json`, SentencePiece, tiktoken.

All save themselves into a directory that `load_tokenizer` reads back, with every file that was
published beside the vocabulary, so that a workdir or a checkpoint carries its own tokenizer.
"""

from .byte import ByteTokenizer
from .json_file import JsonTokenizer
from .loading import load_tokenizer
from .protocol import Tokenizer
from .published import Published
from .sentencepiece import SentencePieceTokenizer
from .tiktoken import TiktokenTokenizer

__all__ = [
    "ByteTokenizer",
    "JsonTokenizer",
    "Published",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
]
