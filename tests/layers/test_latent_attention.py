"""MLA: the absorbed form equals the expanded one, and the cache holds the latent only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxalope.layers.ops.latent_decode as latent_decode
from jaxalope.layers.latent_attention import LatentAttention, write_rows


@pytest.fixture(scope="module")
def layer():
    module = LatentAttention(
        24,
        3,
        kv_lora_rank=10,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        rngs=nnx.Rngs(0),
        stddev=0.3,
    )
    module.kv_a_norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(9), (10,))
    return module


def test_golden_layer(fixtures):
    """Layer 3 of transformers' tiny Kimi Linear, fed directly."""
    from safetensors.numpy import load_file

    tensors = load_file(fixtures / "kimi_linear_tiny/model.safetensors")
    io = np.load(fixtures / "kimi_linear_tiny/io.npz")
    module = LatentAttention(
        48,
        3,
        kv_lora_rank=20,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        rngs=nnx.Rngs(0),
    )
    prefix = "model.layers.3.self_attn."
    for name, param in {
        "q_proj.weight": module.q_proj.kernel,
        "kv_a_proj_with_mqa.weight": module.kv_a_proj.kernel,
        "kv_b_proj.weight": module.kv_b_proj.kernel,
        "o_proj.weight": module.o_proj.kernel,
    }.items():
        param[...] = jnp.asarray(tensors[prefix + name].T.reshape(param.shape))
    module.kv_a_norm.scale[...] = jnp.asarray(tensors[prefix + "kv_a_layernorm.weight"])
    out, _ = module(jnp.asarray(io["attn_in"]))
    np.testing.assert_allclose(out, io["mla_layer3_out"], atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 17])
def test_cached_in_any_portions_equals_uncached(layer, steps):
    """1 and 3 tokens at a time take the absorbed form, 17 the expanded one."""
    x = jax.random.normal(jax.random.key(1), (2, 20, 24))
    expected, none = layer(x)
    assert none is None
    cache, length, parts = layer.init_cache(2, 22, jnp.float32), jnp.zeros(2, jnp.int32), []
    assert cache.latent.shape == (2, 22, 14)
    for start in range(0, 20, steps):
        part = x[:, start : start + steps]
        out, cache = layer(part, cache, length=length)
        length = length + part.shape[1]
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, atol=1e-5)


def test_rows_of_different_lengths(layer):
    x = jax.random.normal(jax.random.key(2), (2, 8, 24))
    cache = layer.init_cache(2, 12, jnp.float32)
    segments = jnp.array([[1] * 8, [1] * 3 + [0] * 5])
    _, cache = layer(x, cache, length=jnp.zeros(2, jnp.int32), segment_ids=segments)
    out, _ = layer(x[:, :1], cache, length=jnp.array([8, 3]))
    short = jnp.concatenate([x[1:, :3], x[1:, :1]], 1)
    np.testing.assert_allclose(out[1, 0], layer(short)[0][0, -1], atol=1e-5)
    long = jnp.concatenate([x[:1], x[:1, :1]], 1)
    np.testing.assert_allclose(out[0, 0], layer(long)[0][0, -1], atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kernel", ["pallas_tpu", "pallas_gpu"])
def test_decoding_by_a_kernel_equals_decoding_without(layer, kernel, steps, monkeypatch):
    run = functools.partial(latent_decode._IMPLEMENTATIONS[kernel], interpret=True)
    monkeypatch.setitem(latent_decode._IMPLEMENTATIONS, kernel, run)
    named = nnx.clone(layer)
    named.decode_implementation = kernel
    x = jax.random.normal(jax.random.key(1), (2, 17 + steps, 24))
    segments = jnp.array([[1] * 17, [1] * 5 + [0] * 12])
    outs = []
    for module in (layer, named):
        _, cache = module(
            x[:, :17],
            module.init_cache(2, 40, jnp.float32),
            length=jnp.zeros(2, jnp.int32),
            segment_ids=segments,
        )
        outs.append(module(x[:, 17:], cache, length=jnp.array([17, 5])))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *outs)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_writing_past_the_end_or_invalid_changes_nothing(one_by_one):
    buffer = jnp.zeros((2, 4, 1))
    new = jnp.arange(1.0, 7.0).reshape(2, 3, 1)
    valid = jnp.array([[True, True, True], [True, False, False]])
    out = write_rows(buffer, new, jnp.array([2, 0]), valid, one_by_one=one_by_one)
    np.testing.assert_array_equal(out[..., 0], [[0, 0, 1, 2], [4, 0, 0, 0]])
