"""Token for token what the public samplers give for the same weights."""

import pathlib

import numpy as np
import pytest

import jaxalope
from jaxalope import Threshold, denoise

FIXTURE = pathlib.Path(__file__).parents[2] / "fixtures" / "llada_tiny"


@pytest.fixture(scope="module")
def model():
    return jaxalope.load(str(FIXTURE))


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(FIXTURE / "io.npz"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gen_pure", {"steps": 16}),
        ("gen_semi_ar", {"steps": 16, "block_length": 4}),
        ("fast_none_thr", {"block_length": 8, "rule": Threshold(0.15)}),
        ("fast_dual_topk", {"block_length": 8, "steps": 16, "cache": "dual"}),
    ],
)
def test_tokens_and_calls_equal_the_published_samplers(model, golden, name, settings):
    result = denoise(model, golden["prompt"], gen_length=16, stop_tokens=(), **settings)
    np.testing.assert_array_equal(result.history[0].tokens, golden[name][0])
    np.testing.assert_array_equal(result.tokens[0], golden[name][0, 9:])
    assert result.nfe == [int(golden.get(name + "_nfe", 16))]
