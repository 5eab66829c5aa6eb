"""Norms: float32 statistics, and the published order of casting and scaling."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalope.layers.norm import GatedRMSNorm, RMSNorm


def test_rms_norm_equals_its_formula():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    norm = RMSNorm(8, epsilon=1e-5)
    norm.scale[...] = jnp.arange(8.0)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.arange(8)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_statistics_are_float32_where_activations_are_bfloat16():
    """256 equal bfloat16 squares would stop adding up at 8 bits of mantissa."""
    x = jnp.full((1, 1, 4096), 3.0, jnp.bfloat16)
    out = RMSNorm(4096)(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32), 1.0)


def test_gated_norm_equals_its_formula():
    keys = jax.random.split(jax.random.key(0), 2)
    x, gate = (jax.random.normal(k, (2, 3, 4, 8)) for k in keys)
    norm = GatedRMSNorm(8, epsilon=1e-5)
    norm.scale[...] = jnp.arange(8.0)
    normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        norm(x, gate), normed * np.arange(8) / (1 + np.exp(-gate)), rtol=1e-4, atol=1e-6
    )
    assert norm(x, gate.astype(jnp.bfloat16)).dtype == jnp.bfloat16
