"""The plan of a stack: what is scanned, and how blocks are taken out and put back."""

import jax
import numpy as np
import pytest

from jaxalope.layers.stack import plan, restack, unstack
from jaxalope.model import KimiLinearConfig


def described(kinds, **options):
    p = plan(kinds, **options)
    return p.start, p.period, p.repeats


def test_the_released_model_compiles_seven_blocks():
    """1 dense KDA block, 6 groups of [KDA KDA MLA KDA], then KDA and MLA."""
    assert described(KimiLinearConfig.kimi_linear_48b().kinds) == (1, 4, 6)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("", (0, 0, 0)),
        ("a", (1, 0, 0)),
        ("ab", (2, 0, 0)),
        ("aaaa", (0, 1, 4)),
        ("abab", (0, 2, 2)),
        ("xababy", (1, 2, 2)),
        ("aab", (0, 1, 2)),
        ("abcabcab", (0, 3, 2)),
    ],
)
def test_longest_repetition_with_the_shortest_group(kinds, expected):
    assert described(kinds) == expected


def test_unrolled_plan_has_no_body():
    assert described("aaaa", scan=False) == (4, 0, 0)


@pytest.mark.parametrize("kinds", ["aaaa", "xababy", "abc"])
def test_unstack_and_restack_are_inverse(kinds):
    layers = plan(kinds)
    blocks = [{"w": np.full((2,), i), "v": {0: np.array(i)}} for i in range(len(kinds))]
    tree = restack(blocks, layers, np)
    again = unstack(tree, layers)
    jax.tree.map(np.testing.assert_array_equal, again, blocks)
    for index in range(len(kinds)):
        part, i, repeat = layers.place(index)
        leaf = tree[part][i]["w"]
        assert (leaf if repeat is None else leaf[repeat])[0] == index
