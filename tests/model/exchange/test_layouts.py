"""Layouts: what is read and written is what NumPy's own reshapes and transposes say."""

import itertools

import numpy as np
import pytest

from jaxalope.model.exchange.layouts import Layout

# layout, our shape (without stacked dimensions), and ours from published by NumPy alone
CASES = {
    "f d -> d f": ((5, 7), lambda x: x.T),
    "(n k) d -> d n k": ((7, 3, 4), lambda x: x.reshape(3, 4, 7).transpose(2, 0, 1)),
    "d (n k) -> n k d": ((3, 4, 7), lambda x: x.reshape(7, 3, 4).transpose(1, 2, 0)),
    "(n k) 1 w -> n k w": ((3, 4, 2), lambda x: x.reshape(3, 4, 2)),
    "1 1 h 1 -> h": ((6,), lambda x: x.reshape(6)),
    "(n k) -> n k": ((3, 4), lambda x: x.reshape(3, 4)),
    "(n 1/3 k) d -> d n k": ((7, 2, 4), lambda x: x.reshape(2, 3, 4, 7)[:, 1].transpose(2, 0, 1)),
    "(0/2 f) d -> d f": ((7, 4), lambda x: x.reshape(2, 4, 7)[0].T),
    "f (1/2 d) -> d f": ((7, 4), lambda x: x.reshape(4, 2, 7)[:, 1].T),
    "(c f) d -> d c f": ((7, 2, 4), lambda x: x.reshape(2, 4, 7).transpose(2, 0, 1)),
    "f (k d) -> k d f": ((3, 7, 4), lambda x: x.reshape(4, 3, 7).transpose(1, 2, 0)),
}


@pytest.mark.parametrize("text", CASES)
def test_reading_a_part_is_the_part_of_the_whole(text):
    shape, by_hand = CASES[text]
    layout = Layout.parse(text)
    published = np.random.default_rng(0).normal(size=layout.published_shape(shape))
    assert layout.fits(published.shape, shape)
    expected = by_hand(published)
    choices = [[slice(0, n), slice(n // 2, n), slice(0, 1), slice(n - 1, n)] for n in shape]
    for index in itertools.product(*choices):
        part = layout.read(lambda at: published[at], shape, index).transpose(layout.order)
        np.testing.assert_array_equal(part, expected[index])


@pytest.mark.parametrize("text", CASES)
def test_writing_is_the_inverse_of_reading(text):
    shape, by_hand = CASES[text]
    layout = Layout.parse(text)
    value = np.random.default_rng(1).normal(size=shape)
    target = np.full(layout.published_shape(shape), np.nan)
    layout.write(target, value.transpose(layout.published_order), shape)
    np.testing.assert_array_equal(by_hand(target), value)


def test_three_of_ours_fill_one_published_tensor():
    rng = np.random.default_rng(2)
    fused = rng.normal(size=(2 * 3 * 4, 7))
    whole = (slice(0, 7), slice(0, 2), slice(0, 4))
    target = np.full_like(fused, np.nan)
    for j in range(3):
        layout = Layout.parse(f"(n {j}/3 k) d -> d n k")
        part = layout.read(lambda at: fused[at], (7, 2, 4), whole)
        layout.write(target, part, (7, 2, 4))
    np.testing.assert_array_equal(target, fused)


def test_two_of_ours_are_of_one_map_that_reads_two_things_side_by_side():
    rng = np.random.default_rng(2)
    published, x, c = rng.normal(size=(5, 8)), rng.normal(size=4), rng.normal(size=4)
    whole = (slice(0, 4), slice(0, 5))
    ours = []
    for j in range(2):
        layout = Layout.parse(f"f ({j}/2 d) -> d f")
        part = layout.read(lambda at: published[at], (4, 5), whole)
        ours.append(part.transpose(layout.order))
    np.testing.assert_allclose(x @ ours[0] + c @ ours[1], published @ np.concatenate([x, c]))


def test_a_padded_vector_is_read_without_its_zeros_and_written_with_them():
    layout = Layout.parse("h* -> h")
    stored = np.array([1.0, 2.0, 3.0, 0.0, 0.0])
    assert layout.fits((5,), (3,)) and layout.fits((3,), (3,)) and not layout.fits((2,), (3,))
    assert layout.read(lambda at: stored[at], (3,), (slice(1, 3),)).tolist() == [2, 3]
    target = np.zeros(5)
    layout.write(target, np.array([1.0, 2.0, 3.0]), (3,))
    np.testing.assert_array_equal(target, stored)


def test_names_of_the_right_side_alone_count_tensors():
    layout = Layout.parse("f d -> e d f")
    assert layout.stacked == 1
    assert layout.published_shape((9, 5, 7)) == (7, 5)


@pytest.mark.parametrize(
    "text", ["f d -> d", "f d -> d f g h", "f d", "f [d] -> d f", "(n 3/3 k) -> n k", "f f -> f"]
)
def test_a_layout_that_says_nothing_clear_is_refused(text):
    with pytest.raises(ValueError, match=r"layout|entries|once"):
        layout = Layout.parse(text)
        # A trailing name that the left side lacks cannot be told from a stacked one before use.
        assert layout.stacked == 0, f"layout {text!r}"
