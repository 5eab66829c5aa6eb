r"""Regular expressions over Unicode text, in Python's syntax, as byte expressions.

Supported: literals, `.` (all but newline), classes with ranges and negation, `\d \w \s` and their
negations, groups (`(...)`, `(?:...)`, `(?P<name>...)`), `|`, `* + ? {m} {m,} {,n} {m,n}` (lazy ones
too: they name the same language), escapes of punctuation and `\n \r \t \f \v \a \0 \xHH \uHHHH
\UHHHHHHHH`, and `^` and `$` at the ends of a top-level branch. The classes are those of `re.ASCII`.
Everything else (back references, look-around, `\b`, flags) is refused by name.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any

from ...errors import InputError
from .characters import ALL, Characters, characters, negated, of, utf8
from .expression import Expression, choice, repeat, sequence

_DIGIT = characters([(0x30, 0x39)])
_WORD = characters([*_DIGIT, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_SPACE = of(" \t\n\r\f\v")
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CLASSES |= {name.upper(): negated(chars) for name, chars in _CLASSES.items()}
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_UNSUPPORTED_ESCAPES = {
    "b": "word boundaries",
    "B": "word boundaries",
    "A": "anchors inside a pattern",
    "Z": "anchors inside a pattern",
    "p": "Unicode properties",
    "P": "Unicode properties",
    "k": "back references",
}
_UNSUPPORTED_GROUPS = {
    "?=": "look-ahead",
    "?!": "look-ahead",
    "?<=": "look-behind",
    "?<!": "look-behind",
    "?P=": "back references",
    "?>": "atomic groups",
    "?(": "conditional groups",
    "?#": "comments",
}
_QUANTIFIERS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_COUNTS = re.compile(r"\{(\d*)(,?)(\d*)\}", re.ASCII)

Encoding = Callable[[Characters], Expression]
"""How one character of a set is written in bytes."""


def full_match(pattern: str, encoding: Encoding = utf8) -> Expression:
    """The texts that `pattern` matches as a whole (`re.fullmatch` with `re.ASCII`).

    Args:
      pattern: in the syntax above.
      encoding: of one character; UTF-8 by default.

    Raises:
      InputError: the pattern is not a regular expression, or uses what is not supported.
    """
    return choice(*(branch.body for branch in _Parser(pattern, _in_bytes(encoding)).pattern()))


def spelled_out(pattern: str) -> str:
    r"""`pattern` in a form that means the same in every dialect of regular expressions.

    Every character but ASCII letters and digits is written `\u{HEX}` (Rust's and ECMAScript's),
    every class as its ranges; what no text matches is an empty negated class.

    Raises:
      InputError: as of `full_match`.
    """
    return _choice_text(*(branch.body for branch in _Parser(pattern, _TEXT).pattern()))


def search(pattern: str, encoding: Encoding = utf8) -> Expression:
    """The texts in which `pattern` matches somewhere (`re.search`); else as `full_match`."""
    rest = repeat(encoding(ALL))
    return choice(
        *(
            sequence(*[rest] * (not b.at_start), b.body, *[rest] * (not b.at_end))
            for b in _Parser(pattern, _in_bytes(encoding)).pattern()
        )
    )


@dataclasses.dataclass(frozen=True)
class _Algebra:
    """What a parser builds of: byte expressions, or another dialect's text."""

    character: Callable[[Characters], Any]
    sequence: Callable[..., Any]
    choice: Callable[..., Any]
    repeat: Callable[[Any, int, int | None], Any]


def _in_bytes(encoding: Encoding) -> _Algebra:
    return _Algebra(encoding, sequence, choice, repeat)


def _character_text(chars: Characters) -> str:
    def one(c: int) -> str:
        return chr(c) if chr(c).isascii() and chr(c).isalnum() else f"\\u{{{c:X}}}"

    if len(chars) == 1 and chars[0][0] == chars[0][1]:
        return one(chars[0][0])
    if not chars:
        return f"[^{one(0)}-{one(sys.maxunicode)}]"
    return "[" + "".join(one(a) if a == b else f"{one(a)}-{one(b)}" for a, b in chars) + "]"


def _choice_text(*branches: str) -> str:
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _repeat_text(body: str, low: int, high: int | None) -> str:
    return f"(?:{body}){{{low},{'' if high is None else high}}}"


_TEXT = _Algebra(_character_text, lambda *parts: "".join(parts), _choice_text, _repeat_text)


@dataclasses.dataclass(frozen=True)
class _Branch:
    body: Any
    at_start: bool
    at_end: bool


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str, algebra: _Algebra):
        self._text, self._at, self._algebra = pattern, 0, algebra

    def pattern(self) -> list[_Branch]:
        branches = [self._top_branch()]
        while self._take("|"):
            branches.append(self._top_branch())
        if self._at < len(self._text):
            raise self._error("this ')' closes nothing; escape it as '\\)'")
        return branches

    def _top_branch(self) -> _Branch:
        at_start = self._take("^")
        body = self._branch()
        return _Branch(body, at_start, at_end=self._take("$"))

    def _branch(self) -> Any:
        parts = []
        while self._at < len(self._text) and self._peek() not in "|)":
            if self._peek() == "$" and self._text[self._at + 1 :][:1] in ("", "|"):
                break
            parts.append(self._quantified())
        return self._algebra.sequence(*parts)

    def _quantified(self) -> Any:
        if self._peek() in "*+?" or self._counts():
            raise self._error("there is nothing to repeat here; escape it to mean the character")
        atom = self._atom()
        if self._at < len(self._text) and self._peek() in _QUANTIFIERS:
            low, high = _QUANTIFIERS[self._next()]
        elif counts := self._counts():
            self._at += len(counts[0])
            low = int(counts[1] or 0)
            high = low if not counts[2] else int(counts[3]) if counts[3] else None
            if high is not None and high < low:
                raise self._error(f"the count {counts[0]} ends below its beginning")
        else:
            return atom
        if self._take("+"):
            raise self._error("possessive quantifiers are not supported")
        self._take("?")  # Lazy: another order of trying, the same language.
        if self._at < len(self._text) and (self._peek() in "*+?" or self._counts()):
            raise self._error("a quantifier cannot repeat another; put a group around the first")
        return self._algebra.repeat(atom, low, high)

    def _counts(self) -> re.Match | None:
        found = _COUNTS.match(self._text, self._at)
        # As in Python, `{}` and whatever else is between braces are just characters.
        return found if found and found[0] != "{}" else None

    def _atom(self) -> Any:
        c = self._next()
        if c == "(":
            return self._group()
        if c == "[":
            return self._algebra.character(self._class())
        if c == ".":
            return self._algebra.character(negated(of("\n")))
        if c == "\\":
            return self._algebra.character(self._escape())
        if c in "^$":
            self._at -= 1
            raise self._error(
                f"{c!r} is supported at the ends of a top-level branch only; escape it to mean "
                "the character"
            )
        return self._algebra.character(self._character(c))

    def _group(self) -> Any:
        start = self._at - 1
        if self._take("?:"):
            pass
        elif named := re.compile(r"\?P?<[A-Za-z_]\w*>").match(self._text, self._at):
            self._at = named.end()
        elif self._text.startswith("?", self._at):
            for opening, what in _UNSUPPORTED_GROUPS.items():
                if self._text.startswith(opening, self._at):
                    raise self._error(f"{what} ('({opening}') is not supported")
            raise self._error("flags and other '(?' groups are not supported")
        branches = [self._branch()]
        while self._take("|"):
            branches.append(self._branch())
        if not self._take(")"):
            self._at = start
            raise self._error("this group is not closed; add ')'")
        return self._algebra.choice(*branches)

    def _class(self) -> Characters:
        start, negate, ranges = self._at - 1, self._take("^"), []
        first = True
        while first or not self._take("]"):
            if self._at >= len(self._text):
                self._at = start
                raise self._error("this character class is not closed; add ']'")
            first = False
            low = self._class_member()
            if self._peek() == "-" and self._text[self._at + 1 :][:1] not in ("]", ""):
                self._next()
                high = self._class_member()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1]:
                    raise self._error("a range goes from one character to another")
                if high[0][0] != high[0][1] or high[0][1] < low[0][0]:
                    raise self._error("a range goes from a lower character to a higher one")
                ranges.append((low[0][0], high[0][1]))
            else:
                ranges.extend(low)
        found = characters(ranges)
        return negated(found) if negate else found

    def _class_member(self) -> Characters:
        c = self._next()
        if c != "\\":
            return self._character(c)
        if self._peek() == "b":
            self._next()
            return of("\b")
        return self._escape()

    def _escape(self) -> Characters:
        if self._at >= len(self._text):
            raise self._error("the pattern ends in a lone backslash; write '\\\\'")
        c = self._next()
        if c in _CLASSES:
            return _CLASSES[c]
        if c in _HEX_DIGITS:
            digits = self._text[self._at : self._at + _HEX_DIGITS[c]]
            if not re.fullmatch(f"[0-9a-fA-F]{{{_HEX_DIGITS[c]}}}", digits):
                raise self._error(f"\\{c} takes {_HEX_DIGITS[c]} hexadecimal digits")
            self._at += len(digits)
            if int(digits, 16) > 0x10FFFF:
                raise self._error(f"\\{c}{digits} is above the last character, U+10FFFF")
            return self._character(chr(int(digits, 16)))
        if c in _ESCAPES and not (c == "0" and self._text[self._at :][:1].isdigit()):
            return of(_ESCAPES[c])
        if c in _UNSUPPORTED_ESCAPES:
            raise self._error(f"{_UNSUPPORTED_ESCAPES[c]} (\\{c}) are not supported")
        if c.isdigit():
            raise self._error(f"back references and octal escapes (\\{c}) are not supported")
        if c.isalpha() and c.isascii():
            raise self._error(f"the escape \\{c} is not supported")
        return self._character(c)

    def _character(self, c: str) -> Characters:
        found = of(c)
        if not found:
            raise self._error(f"U+{ord(c):04X} is half a character and has no UTF-8")
        return found

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, expected: str) -> bool:
        taken = self._text.startswith(expected, self._at)
        self._at += len(expected) * taken
        return taken

    def _error(self, what: str) -> InputError:
        return InputError(f"pattern {self._text!r}, character {self._at}: {what}")
