"""Norms: float32 statistics, and the published order of casting and scaling."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalope.layers.norm import GatedRMSNorm, LayerNorm, RMSNorm


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


def test_unit_offset_scales_in_float32_before_the_cast():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8), jnp.bfloat16)
    norm = RMSNorm(8, epsilon=1e-6, unit_offset=True)
    np.testing.assert_array_equal(norm.scale[...], 0)
    norm.scale[...] = jnp.arange(8.0) / 7
    x32 = np.asarray(x, np.float64)
    expected = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-6) * (1 + np.arange(8) / 7)
    np.testing.assert_allclose(norm(x.astype(jnp.float32)), expected, rtol=1e-5)
    # One rounding in all: half a unit in the last of bfloat16's 8 places.
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype(np.float32), expected, rtol=2**-8)


def test_layer_norm_equals_its_formula():
    """Also where the mean is large: centred before it is squared."""
    x = np.random.default_rng(0).normal(size=(2, 3, 8)) + 300
    norm = LayerNorm(8, epsilon=1e-5)
    np.testing.assert_allclose(np.mean(norm(jnp.asarray(x, jnp.float32)), -1), 0, atol=1e-4)
    norm.scale[...], norm.bias[...] = jnp.arange(8.0), jnp.arange(8.0) - 3
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * np.arange(8) + np.arange(8) - 3
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-3, atol=1e-3)
    low = norm(jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert np.isfinite(low.astype(np.float32)).all()
