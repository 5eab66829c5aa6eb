"""Grammars by the libraries llguidance and xgrammar, behind our protocol.

Both are compiled code and know more of JSON Schema than `json_schema.py`. They share the protocol
and the meaning of a mask with the Python backend; each has its own opinion on keywords, and
xgrammar its own dialect of regular expressions. llguidance (1.9), where an object may have further
properties, lets a named one be spelled a second time with escapes (`"\\u0061"` for `"a"`), which a
parser then takes for the value; set `additionalProperties` to false, or use `backend="python"`,
where that matters. xgrammar (0.2) leaves some assertions out without a word (`uniqueItems`) and
lets control characters and surrogates into JSON strings, unescaped. The end of sequence is ours in
both: the libraries differ in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import weakref
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import InputError
from .matcher import GrammarMatcher, check_rollback, copy_words, forced_tokens
from .regex import spelled_out
from .vocabulary import Vocabulary

_INSTALL = {
    "llguidance": "pip install 'jaxalope[grammar]'",
    "xgrammar": "pip install 'xgrammar>=0.2' (it brings PyTorch)",
}


def installed(name: str) -> bool:
    """Whether the library can be imported; does not import it."""
    return importlib.util.find_spec(name) is not None


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(
            f"backend={name!r}: the library {name} cannot be imported ({e}); {_INSTALL[name]}, or "
            "use backend='python'"
        ) from e


class LLGuidance:
    """Compiles grammars with llguidance (Earley parser over derivatives, in Rust)."""

    def __init__(self, vocabulary: Vocabulary):
        """Raises InputError if the library is missing."""
        self._library = _library("llguidance")
        self._vocabulary = vocabulary
        if vocabulary not in _TOKENIZERS:
            source = _TokenSource(vocabulary)
            _TOKENIZERS[vocabulary] = self._library.LLTokenizer(
                source, eos_token=source.eos_token_id
            )
        self._tokens = _TOKENIZERS[vocabulary]

    def regex(self, pattern: str) -> LLGuidanceGrammar:
        """Texts that `pattern` (in the syntax of `regex.py`) matches as a whole."""
        return self.lark(f"start: /{spelled_out(pattern)}/")

    def json_schema(self, schema: Any, whitespace: int) -> LLGuidanceGrammar:
        """Documents of a schema, white space and escapes as in the Python backend."""
        options: dict[str, Any] = {"json_allow_general_unicode_escapes": True}
        if whitespace:
            options["whitespace_pattern"] = f"[ \\n\\r\\t]{{1,{whitespace}}}"
        else:
            options["whitespace_flexible"] = False
        schema = {} if schema is True else schema
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {**options, **schema.get("x-guidance", {})}}
        return self.lark(f"start: %json {json.dumps(schema)}")

    def lark(self, text: str) -> LLGuidanceGrammar:
        """Texts of a grammar in the library's dialect of Lark."""
        if self._vocabulary.encode is None:
            # Without the tokenizer's spelling, what is forced may be spelled in any way.
            text = '%llguidance {"no_forcing": true}\n' + text
        first = self._library.LLMatcher(self._tokens, text, log_level=0)
        if first.is_error():
            reason = first.get_error().split("\n<state>")[0]
            raise InputError(f"llguidance refuses this grammar: {reason}")
        return LLGuidanceGrammar(first, self._vocabulary)


class _TokenSource:
    """A vocabulary, under the names by which llguidance asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary):
        self._encode = vocabulary.encode
        # A name that begins with 0xFF is how the library marks what is no text.
        self.tokens = [
            b"\xff<|%d|>" % i if t is None else t for i, t in enumerate(vocabulary.tokens)
        ]
        self.special_token_ids = [i for i, t in enumerate(vocabulary.tokens) if t is None]
        self.eos_token_id = vocabulary.eos_id
        if self.eos_token_id is None:
            # The library wants one: an id that no mask of ours reaches.
            self.eos_token_id = len(self.tokens)
            self.tokens.append(b"\xff<|end|>")
            self.special_token_ids.append(self.eos_token_id)
        self._by_bytes = {t: i for i, t in enumerate(vocabulary.tokens) if t}
        self._longest = max(map(len, self._by_bytes), default=0)

    def __call__(self, text: str) -> list[int]:
        """Ids of `text` as the tokenizer has them; by longest match where it changes the text."""
        data = text.encode()
        ids = [] if self._encode is None else list(self._encode(text))
        if b"".join(self.tokens[i] for i in ids) == data:
            return ids
        ids, at = [], 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next((n for n in sizes if data[at : at + n] in self._by_bytes), 0)
            if not size:
                break
            ids.append(self._by_bytes[data[at : at + size]])
            at += size
        return ids


_TOKENIZERS: weakref.WeakKeyDictionary[Vocabulary, Any] = weakref.WeakKeyDictionary()


class LLGuidanceGrammar:
    """A `Grammar` of llguidance."""

    def __init__(self, first: Any, vocabulary: Vocabulary):
        self._first, self._vocabulary = first, vocabulary

    def matcher(self) -> GrammarMatcher:
        """A matcher at the beginning of a text."""
        return _LLGuidanceMatcher(self._first.deep_copy(), self._vocabulary)


class XGrammar:
    """Compiles grammars with xgrammar (pushdown automata, in C++)."""

    def __init__(self, vocabulary: Vocabulary):
        """Raises InputError if the library is missing."""
        library = _library("xgrammar")
        self._library, self._vocabulary = library, vocabulary
        if vocabulary not in _COMPILERS:
            tokens = library.TokenizerInfo(
                [t or b"" for t in vocabulary.tokens],
                library.VocabType.RAW,
                stop_token_ids=[] if vocabulary.eos_id is None else [vocabulary.eos_id],
            )
            _COMPILERS[vocabulary] = library.GrammarCompiler(tokens)
        self._compiler = _COMPILERS[vocabulary]

    def regex(self, pattern: str) -> XGrammarGrammar:
        """Texts that `pattern` (the library's syntax) matches as a whole."""
        return self._compiled(lambda: self._compiler.compile_regex(pattern))

    def json_schema(self, schema: Any, whitespace: int) -> XGrammarGrammar:
        """Documents of a schema. Unlike the others, takes some keywords without enforcing them."""
        space = {"any_whitespace": True, "max_whitespace_cnt": whitespace}
        if not whitespace:
            space = {"any_whitespace": False, "separators": (",", ":")}
        return self._compiled(
            lambda: self._compiler.compile_json_schema(
                json.dumps(schema), strict_mode=False, **space
            )
        )

    def lark(self, text: str) -> XGrammarGrammar:
        """Texts of a grammar in the library's dialect of Lark."""
        return self._compiled(lambda: self._compiler.compile_lark(text))

    def _compiled(self, compile) -> XGrammarGrammar:
        try:
            return XGrammarGrammar(self._library.GrammarMatcher, compile(), self._vocabulary)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"xgrammar refuses this grammar: {e}") from e


_COMPILERS: weakref.WeakKeyDictionary[Vocabulary, Any] = weakref.WeakKeyDictionary()


class XGrammarGrammar:
    """A `Grammar` of xgrammar."""

    def __init__(self, kind: type, compiled: Any, vocabulary: Vocabulary):
        self._kind, self._compiled, self._vocabulary = kind, compiled, vocabulary

    def matcher(self) -> GrammarMatcher:
        """A matcher at the beginning of a text."""
        return _XGrammarMatcher(self._kind(self._compiled), self._vocabulary)


class _LibraryMatcher:
    """A `GrammarMatcher` around a library's, which never gets to see the end of sequence."""

    def __init__(self, inner: Any, vocabulary: Vocabulary):
        self._inner, self._vocabulary = inner, vocabulary
        self._accepted, self._ended = 0, False
        self._own = np.zeros(vocabulary.num_words, np.int32)

    def _fill(self) -> np.ndarray:
        """The library's mask, as int32 words of any number."""
        raise NotImplementedError

    def _step(self, token: int) -> bool:
        raise NotImplementedError

    def _undo(self, n: int) -> None:
        raise NotImplementedError

    def _complete(self) -> bool:
        raise NotImplementedError

    @property
    def is_done(self) -> bool:
        """See `GrammarMatcher`."""
        if self._ended or self._vocabulary.eos_id is not None:
            return self._ended
        return self._complete() and not self._words().any()

    def _words(self) -> np.ndarray:
        words = self._own
        if self._ended:
            words[:] = 0
            return words
        copy_words(self._fill(), words)
        beyond = -len(self._vocabulary.tokens) % 32
        words.view(np.uint32)[-1] &= np.uint32(0xFFFFFFFF >> beyond)
        if self._vocabulary.eos_id is not None:
            word, bit = divmod(self._vocabulary.eos_id, 32)
            bit = np.uint32(1 << bit)
            words.view(np.uint32)[word] &= ~bit
            if self._complete():
                words.view(np.uint32)[word] |= bit
        return words

    def mask(self, words: np.ndarray) -> None:
        """See `GrammarMatcher`."""
        copy_words(self._words(), words)

    def accept(self, token: int) -> bool:
        """See `GrammarMatcher`."""
        if self._ended or not 0 <= token < len(self._vocabulary.tokens):
            return False
        if token == self._vocabulary.eos_id:
            self._ended = taken = self._complete()
        else:
            taken = self._step(token)
        self._accepted += taken
        return taken

    def rollback(self, n: int) -> None:
        """See `GrammarMatcher`."""
        check_rollback(n, self._accepted)
        if n:
            steps = n - self._ended
            self._accepted, self._ended = self._accepted - n, False
            if steps:
                self._undo(steps)

    def forced_tokens(self) -> list[int]:
        """See `GrammarMatcher`."""
        return forced_tokens(self, self._vocabulary.num_words)


class _LLGuidanceMatcher(_LibraryMatcher):
    def _fill(self) -> np.ndarray:
        return np.frombuffer(self._inner.compute_bitmask(), "<i4")

    def _step(self, token: int) -> bool:
        return self._inner.try_consume_tokens([token]) == 1

    def _undo(self, n: int) -> None:
        self._inner.rollback(n)

    def _complete(self) -> bool:
        return self._inner.is_accepting()


class _XGrammarMatcher(_LibraryMatcher):
    def _fill(self) -> np.ndarray:
        row = np.empty((1, self._vocabulary.num_words), np.int32)
        self._inner.fill_next_token_bitmask(row)
        return row[0]

    def _step(self, token: int) -> bool:
        return self._inner.accept_token(token)

    def _undo(self, n: int) -> None:
        self._inner.rollback(n)

    def _complete(self) -> bool:
        return self._inner.is_completed()
