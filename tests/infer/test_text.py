"""Text as it grows: joined pieces are the whole, code points come complete, stop strings hold."""

import numpy as np
import pytest

from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.infer.text import TextStream

BYTES = load_tokenizer("bytes")
TEXT = "naïve 🦌 jackalope → “ok”\n"


def pieces(text, stop=(), sizes=(1,)):
    ids, stream, out, at = BYTES.encode(text), TextStream(BYTES.decode, stop), [], 0
    while at < len(ids):
        size = sizes[len(out) % len(sizes)]
        out.append(stream.push(ids[at : at + size]))
        at += size
    out.append(stream.finish())
    return out, stream


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 5, 2), (100,)])
def test_pieces_are_the_text(sizes):
    out, stream = pieces(TEXT, sizes=sizes)
    assert "".join(out) == stream.text == TEXT
    assert not any("\ufffd" in piece for piece in out)


def test_a_code_point_comes_once_it_is_complete():
    assert pieces("🦌")[0] == ["", "", "", "🦌", ""]


def test_broken_bytes_come_as_replacements():
    stream = TextStream(BYTES.decode)
    ids = [0xF0, 0x9F, *b"ab", 0xC3]
    text = "".join([stream.push([i]) for i in ids]) + stream.finish()
    assert text == BYTES.decode(ids)


@pytest.mark.parametrize("sizes", [(1,), (4,), (100,)])
def test_stop_string_across_tokens(sizes):
    out, stream = pieces("one two END three", stop=("END", "three"), sizes=sizes)
    assert "".join(out) == stream.text == "one two "
    assert stream.stopped
    assert stream.num_tokens == len("one two END")


def test_what_may_begin_a_stop_string_is_held_back():
    stream = TextStream(BYTES.decode, ("END",))
    assert stream.push(b"aEN") == "a"
    assert stream.push(b"x") == "E"
    assert stream.push(b"yz") == "Nx"
    assert stream.finish() == "yz"


def test_the_earliest_stop_string_wins():
    assert pieces("abcdef", stop=("def", "c"))[1].text == "ab"


def test_random_stop_strings_equal_find():
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("abé"), 12))
        stop = tuple("".join(rng.choice(list("abé"), rng.integers(1, 4))) for _ in range(2))
        # The text ends where a stop string is first complete, before its beginning.
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        out, stream = pieces(text, stop, sizes=(1, 2))
        assert stream.stopped == bool(ends)
        if ends:
            first = min(ends)[0]
            starts = [start for end, start in ends if end == first]
            assert stream.text == text[: min(starts)]
            assert "".join(out) == stream.text
