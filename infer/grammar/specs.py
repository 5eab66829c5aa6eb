"""Grammars as users write them: `Regex`, `JsonSchema`, `Json`, `LarkGrammar`.

A spec is a small frozen value. `compile` makes a `Grammar` of it, for one vocabulary, by one of
three backends; all three serve the same protocol.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Protocol

from ...data.tokenizers import Tokenizer
from ...errors import InputError
from .automaton import PythonGrammar
from .json_schema import json_schema
from .libraries import LLGuidance, XGrammar, installed
from .matcher import Grammar
from .regex import full_match
from .vocabulary import Vocabulary

# Room for a line break and an indentation of seven levels by two.
_WHITESPACE = 15


class _Python:
    """The backend that needs no library."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary

    def regex(self, pattern: str) -> Grammar:
        return PythonGrammar(full_match(pattern), self._vocabulary)

    def json_schema(self, schema: Any, whitespace: int) -> Grammar:
        return PythonGrammar(json_schema(schema, whitespace), self._vocabulary)

    def lark(self, text: str) -> Grammar:
        raise InputError(
            "a LarkGrammar needs a library: pip install 'jaxalope[grammar]' and leave backend out, "
            "or write the grammar as a Regex or a JsonSchema"
        )


class _Compiler(Protocol):
    def regex(self, pattern: str) -> Grammar: ...
    def json_schema(self, schema: Any, whitespace: int) -> Grammar: ...
    def lark(self, text: str) -> Grammar: ...


_BACKENDS = {"llguidance": LLGuidance, "xgrammar": XGrammar, "python": _Python}


class _Spec:
    def compile(
        self,
        vocabulary: Vocabulary | Tokenizer,
        eos_id: int | None = None,
        backend: str | None = None,
    ) -> Grammar:
        """Makes a grammar for one vocabulary, to be shared by all requests.

        Args:
          vocabulary: of the model's tokenizer, or the tokenizer itself. Where several grammars are
            compiled, one `Vocabulary` for all saves the work of reading it.
          eos_id: ends a text, instead of the vocabulary's own.
          backend: `"llguidance"`, `"xgrammar"` or `"python"`; None is llguidance where it is
            installed, else Python. (xgrammar is taken by name only: the strings of its JSON may
            hold bytes that no JSON parser takes.)

        Raises:
          InputError: the grammar is wrong, or the backend does not support it or is missing.
        """
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.from_tokenizer(vocabulary)
        if eos_id is not None and eos_id != vocabulary.eos_id:
            vocabulary = dataclasses.replace(vocabulary, eos_id=eos_id)
        if backend is None:
            backend = "llguidance" if installed("llguidance") else "python"
        if backend not in _BACKENDS:
            raise InputError(
                f"backend={backend!r} is unknown; use None, or one of "
                f"{', '.join(map(repr, _BACKENDS))}"
            )
        return self._compile(_BACKENDS[backend](vocabulary))

    def _compile(self, compiler: _Compiler) -> Grammar:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Regex(_Spec):
    """Texts that a regular expression matches as a whole; for the syntax, see `regex.py`.

    llguidance means by it what the Python backend does; xgrammar has a dialect of its own.
    """

    pattern: str

    def _compile(self, compiler: _Compiler) -> Grammar:
        return compiler.regex(self.pattern)


@dataclasses.dataclass(frozen=True, init=False)
class JsonSchema(_Spec):
    """JSON documents that satisfy a schema; for what is supported, see `json_schema.py`.

    Attributes:
      text: the schema, as JSON.
      whitespace: most characters of white space in each place that may have some.
    """

    text: str
    whitespace: int

    def __init__(self, schema: dict[str, Any] | bool | str, whitespace: int = _WHITESPACE):
        """Args: the schema, as a dict, a bool, or JSON text; `whitespace`, see above.

        Raises:
          InputError: `schema` is no JSON, or `whitespace` is negative.
        """
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise InputError(f"schema is not JSON: {e}") from e
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "whitespace", whitespace)
        _check_whitespace(whitespace)

    def _compile(self, compiler: _Compiler) -> Grammar:
        return compiler.json_schema(json.loads(self.text), self.whitespace)


@dataclasses.dataclass(frozen=True)
class Json(_Spec):
    """Any JSON document.

    Attributes:
      whitespace: most characters of white space in each place that may have some.
    """

    whitespace: int = _WHITESPACE

    def __post_init__(self):
        _check_whitespace(self.whitespace)

    def _compile(self, compiler: _Compiler) -> Grammar:
        return compiler.json_schema(True, self.whitespace)


@dataclasses.dataclass(frozen=True)
class LarkGrammar(_Spec):
    """Texts of a context-free grammar in a library's dialect of Lark; no Python backend."""

    text: str

    def _compile(self, compiler: _Compiler) -> Grammar:
        return compiler.lark(self.text)


def _check_whitespace(whitespace: int) -> None:
    if whitespace < 0:
        raise InputError(f"whitespace={whitespace} must be 0 (none) or more")
