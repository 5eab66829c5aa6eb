"""A vocabulary with tokens that cross every border, and small helpers around masks."""

import numpy as np
import pytest

from jaxalope.infer.grammar import Vocabulary
from jaxalope.infer.grammar.matcher import unpack

MERGED = [
    *(b"{", b'{"', b'":', b'": ', b'",', b'", "', b'"}', b'"]', b"}}", b"]]", b"]}", b"}]", b"[["),
    *(
        b"[{",
        b"[]",
        b"{}",
        b"true",
        b"false",
        b"null",
        b"tr",
        b"ue}",
        b"12",
        b"-1",
        b".5",
        b"0.",
        b"e+",
    ),
    *(
        b"\n  ",
        b"  ",
        b" \n\t",
        b"\\u",
        b"\\u00",
        b"\\ud83e",
        b"\\n",
        b'\\"',
        b'a"',
        b"ab",
        b"abc",
        b"name",
    ),
    *("é".encode(), "🦌".encode(), "🦌".encode()[:2], "🦌".encode()[2:], "é".encode()[1:] + b'"'),
    b"ab",  # Two ids may have the same bytes.
    b"",  # And some have none.
]


@pytest.fixture(scope="session")
def vocabulary():
    """All bytes, merged tokens, two special tokens; the last one, 256 + ..., ends a text."""
    tokens = (*(bytes([b]) for b in range(256)), *MERGED, None, None)
    return Vocabulary(tokens, eos_id=len(tokens) - 1)


def allowed(matcher, vocabulary):
    """Ids that the mask allows."""
    words = np.full(vocabulary.num_words, -1, np.int32)
    matcher.mask(words)
    assert not unpack(words, 32 * vocabulary.num_words)[len(vocabulary.tokens) :].any()
    return np.flatnonzero(unpack(words, len(vocabulary.tokens)))


def walk(grammar, vocabulary, rng, most):
    """Draws uniformly among the allowed tokens; returns the ids and whether the text ended."""
    matcher, ids = grammar.matcher(), []
    for _ in range(most):
        choices = allowed(matcher, vocabulary)
        assert len(choices), "a text that cannot go on"
        ids.append(int(rng.choice(choices)))
        assert matcher.accept(ids[-1])
        if matcher.is_done:
            return ids[:-1], True
    return ids, False


def text_of(ids, vocabulary):
    return b"".join(vocabulary.tokens[i] for i in ids)


@pytest.fixture(scope="session")
def tools():
    """`allowed`, `walk` and `text_of`, for test modules that cannot import this file."""
    import types

    return types.SimpleNamespace(allowed=allowed, walk=walk, text_of=text_of)
