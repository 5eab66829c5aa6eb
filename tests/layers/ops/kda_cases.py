"""How tests of KDA run it, differentiate it, and compare."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from chips import interpreted

import jaxalope.layers.ops.kda as kda_module
from jaxalope.layers.ops.kda import kda, l2norm, pallas_gpu, pallas_gpu_step, pallas_tpu, step

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "kda"
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")


def run(arrays, segment_ids=None, **kwargs):
    *tokens, state = arrays
    return kda(*tokens, initial_state=state, segment_ids=segment_ids, **kwargs)


def low_precision(arrays):
    """The same with q, k and v in bfloat16, as models have them."""
    return (*(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:])


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


def interpret(monkeypatch, implementation):
    """Pallas kernels under their public name, run by XLA where the host has no such chip."""
    tables = {
        "pallas_tpu": [(kda_module._IMPLEMENTATIONS, pallas_tpu.kda_pallas_tpu)],
        "pallas_gpu": [
            (kda_module._IMPLEMENTATIONS, pallas_gpu.kda_pallas_gpu),
            (step.STEPS, pallas_gpu_step.kda_step_pallas_gpu),
        ],
    }
    for table, kernels in tables.get(implementation, []):
        run = functools.partial(kernels, interpret=interpreted(implementation))
        monkeypatch.setitem(table, implementation, run)


def draw_heads(length, batch=1, heads=1, value_heads=1, key=5, value=7, decay="strong"):
    """q, k, v, g, beta, initial_state, and cotangents of o and of the final state."""
    rng = np.random.default_rng(0)

    def normal(*dims):
        return jnp.asarray(rng.normal(size=dims), jnp.float32)

    logs = {"strong": (1e-3, 300.0), "bounded": (1e-2, 5.0)}[decay]
    g = -np.exp(rng.uniform(*np.log(logs), size=(batch, length, value_heads, key)))
    arrays = (
        l2norm(normal(batch, length, heads, key)),
        l2norm(normal(batch, length, heads, key)),
        normal(batch, length, value_heads, value),
        jnp.asarray(g, jnp.float32),
        jax.nn.sigmoid(normal(batch, length, value_heads)),
        normal(batch, value_heads, key, value),
    )
    shapes = (batch, length, value_heads, value), (batch, value_heads, key, value)
    return arrays, tuple(normal(*s) for s in shapes)
