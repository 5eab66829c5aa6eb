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


def byte_fallback():
    """Llama's way: a token a byte, and a run of bytes that is no text is as many replacements."""

    def decode(ids):
        data = bytes(ids)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(data)

    return decode


def straddling(text):
    """Tokens of two bytes each, so that characters of three bytes seldom end where a token does."""
    data = text.encode()
    table = [data[i : i + 2] for i in range(0, len(data), 2)]
    return (
        lambda ids: b"".join(table[i] for i in ids).decode(errors="replace"),
        list(range(len(table))),
    )


@pytest.mark.parametrize("text", ["日本語で", "สวัสดี", "a日b本語🦌🦌c", "日本語文字" * 5])
def test_long_runs_of_open_code_points(text):
    for decode, ids in ((byte_fallback(), list(text.encode())), straddling(text)):
        stream = TextStream(decode)
        out = "".join([stream.push([i]) for i in ids]) + stream.finish()
        assert out == stream.text == text


def test_a_stop_string_before_an_open_code_point_is_found_at_once():
    tokens = [b"a END\xe2", b"\x82", b"\xac"]
    stream = TextStream(
        lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"), ("END",)
    )
    assert stream.push(range(3)) == "a "
    assert stream.stopped and stream.num_tokens == 1


def test_bytes_that_are_no_text_come_after_a_while():
    stream = TextStream(BYTES.decode)
    assert "".join(stream.push([0xFF]) for _ in range(64)) == "\ufffd" * 64


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
