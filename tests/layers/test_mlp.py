"""Feed-forward layers and linear maps against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.layers.linear import Embedding, Linear
from jaxalope.layers.mlp import MLP, GatedMLP, SwiGLU, gelu_tanh

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


def silu(x):
    return x / (1 + np.exp(-x))


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("given", "formula"), [({}, silu), ({"activation": gelu_tanh}, tanh_gelu)])
def test_gated(given, formula):
    layer = GatedMLP(8, 12, rngs=nnx.Rngs(0), stddev=1.0, **given)
    gate, up, down = (
        np.asarray(p.kernel[...]) for p in (layer.gate_proj, layer.up_proj, layer.down_proj)
    )
    x = np.asarray(X)
    np.testing.assert_allclose(layer(X), (formula(x @ gate) * (x @ up)) @ down, atol=1e-4)
    assert SwiGLU is GatedMLP


def test_plain_has_biases_and_the_exact_gelu():
    layer = MLP(8, 12, rngs=nnx.Rngs(0), stddev=1.0)
    for i, proj in enumerate((layer.up_proj, layer.down_proj)):
        np.testing.assert_array_equal(proj.bias[...], 0)
        proj.bias[...] = jax.random.normal(jax.random.key(i), proj.bias.shape)
    hidden = np.asarray(X) @ layer.up_proj.kernel[...] + layer.up_proj.bias[...]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    expected = hidden @ layer.down_proj.kernel[...] + layer.down_proj.bias[...]
    np.testing.assert_allclose(layer(X), expected, atol=1e-4)


def test_bias_has_the_produced_axes():
    kernel = {"heads": 2, "head_dim": 3}
    assert not hasattr(Linear({"embed": 8}, kernel, rngs=nnx.Rngs(0)), "bias")
    layer = Linear({"embed": 8}, kernel, rngs=nnx.Rngs(0), use_bias=True)
    layer.bias[...] = jnp.arange(6.0).reshape(2, 3).astype(jnp.bfloat16)
    assert layer.bias.get_metadata()["axes"] == ("heads", "head_dim")
    expected = np.tensordot(X, layer.kernel[...], 1) + np.arange(6.0).reshape(2, 3)
    found = layer(X)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert layer(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_table_is_its_own_output_head():
    table = Embedding(11, 8, rngs=nnx.Rngs(0), stddev=1.0)
    expected = np.asarray(X) @ np.asarray(table.embedding[...]).T
    np.testing.assert_allclose(table.logits(X), expected, atol=1e-5)
    assert table.logits(X.astype(jnp.bfloat16)).dtype == jnp.float32
