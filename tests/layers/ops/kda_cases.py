"""How tests of KDA run it, differentiate it, and compare."""

import pathlib

import jax
import numpy as np

from jaxalope.layers.ops.kda import kda

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "kda"
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")


def run(arrays, segment_ids=None, **kwargs):
    *tokens, state = arrays
    return kda(*tokens, initial_state=state, segment_ids=segment_ids, **kwargs)


def value_and_grads(arrays, cotangents, segment_ids=None, **kwargs):
    """(o, final state) and the gradients of sum(o * w) + sum(S * u), jitted."""

    @jax.jit
    def both(arrays, cotangents, segment_ids):
        out, pullback = jax.vjp(lambda *a: run(a, segment_ids, **kwargs), *arrays)
        cotangents = tuple(c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True))
        return out, pullback(cotangents)

    return both(arrays, cotangents, segment_ids)


def close(got, want, tolerance):
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance), got, want
    )


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
