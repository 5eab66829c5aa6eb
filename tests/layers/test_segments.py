"""What segment_ids mean: padding, first segments, repeated ids."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalope.layers.segments import is_token, segment_index, segment_starts, token_positions

# ids, starts, running index, positions
CASES = {
    "one segment": ([3, 3, 3], [0, 0, 0], [0, 0, 0], [0, 1, 2]),
    "two touching": ([1, 1, 2, 2], [0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]),
    "left padding": ([0, 0, 5, 5], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]),
    "right padding": ([5, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]),
    "padding between": ([1, 0, 0, 2, 2], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]),
    "padding inside a segment": ([1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 2]),
    "an id comes back": ([1, 2, 1], [0, 1, 1], [0, 1, 2], [0, 0, 0]),
    "ids fall": ([9, 4, 0, 2], [0, 1, 0, 1], [0, 1, 1, 2], [0, 0, 0, 0]),
    "only padding": ([0, 0], [0, 0], [0, 0], [0, 0]),
    "one token": ([7], [0], [0], [0]),
}


@pytest.mark.parametrize("name", CASES)
def test_starts_index_and_positions(name):
    ids, starts, index, positions = (jnp.asarray([row]) for row in CASES[name])
    np.testing.assert_array_equal(segment_starts(ids)[0], starts[0].astype(bool))
    np.testing.assert_array_equal(segment_index(ids)[0], index[0])
    np.testing.assert_array_equal(token_positions(ids)[0], positions[0])
    np.testing.assert_array_equal(is_token(ids)[0], ids[0] != 0)


def test_rows_are_independent():
    rows = [CASES["padding between"][0], CASES["ids fall"][0] + [2]]
    both = segment_index(jnp.asarray(rows))
    for row, index in zip(rows, both, strict=True):
        np.testing.assert_array_equal(segment_index(jnp.asarray([row]))[0], index)
