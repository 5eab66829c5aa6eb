"""The attention module: every way of feeding a sequence gives the same mix, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope import InputError
from jaxalope.layers.attention import Attention
from jaxalope.layers.ops.attention import xla
from jaxalope.sharding import (
    AxisRules,
    MeshConfig,
    make_mesh,
    param_axes,
    shardings,
    split,
    use_mesh,
)

D, LENGTH = 12, 23
KINDS = {
    "plain": {},
    "rotary fraction and biases": {"num_kv_heads": None, "rotary_dim": 4, "use_bias": True},
    "full, capped": {"rotary_dim": 8, "softcap": 2.0, "scale": 0.5},
    "window, capped": {"rotary_dim": 8, "softcap": 2.0, "scale": 0.5, "window": 5},
    "window of one": {"window": 1},
}


def make(**changes):
    options = {"num_kv_heads": 2, "head_dim": 8, "stddev": 0.5, **changes}
    module = Attention(D, 4, rngs=nnx.Rngs(0), **options)
    if module.window:
        assert module.window < LENGTH
    if options.get("use_bias"):
        for i, proj in enumerate((module.q_proj, module.k_proj, module.v_proj, module.o_proj)):
            proj.bias[...] = jax.random.normal(jax.random.key(i), proj.bias.shape)
    return module


@pytest.fixture(scope="module", params=KINDS)
def layer(request):
    return make(**KINDS[request.param])


def inputs(batch=2, length=LENGTH, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, length, D))


def run(layer):
    """The module, compiled: ``call(x, cache, **arguments)``."""
    graphdef, params = split(layer)
    forward = jax.jit(lambda params, *args, **kw: nnx.merge(graphdef, params)(*args, **kw))
    return lambda *args, **kw: forward(params, *args, **kw)


def apply(proj, x, contracted=1):
    bias = np.asarray(proj.bias[...]) if hasattr(proj, "bias") else 0
    return np.tensordot(x, np.asarray(proj.kernel[...], np.float64), contracted) + bias


def test_equals_its_formula(layer):
    """One head and one query at a time, in numpy and float64."""
    x = inputs()
    q, k, v = (apply(p, np.asarray(x)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    r = layer.rotary_dim or 0
    for j in range(r // 2):
        turn = np.exp(1j * np.arange(LENGTH) * 10000.0 ** (-2 * j / r))[:, None]
        for y in (q, k):
            pair = (y[..., j] + 1j * y[..., j + r // 2]) * turn
            y[..., j], y[..., j + r // 2] = pair.real, pair.imag
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = slice(0 if layer.window is None else max(0, t - layer.window + 1), t + 1)
        g = n // (q.shape[2] // k.shape[2])
        scores = layer.scale * k[b, seen, g] @ q[b, t, n]
        if layer.softcap:
            scores = layer.softcap * np.tanh(scores / layer.softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, g] / weights.sum()
    found, none = layer(x)
    assert none is None
    np.testing.assert_allclose(found, apply(layer.o_proj, out, 2), atol=1e-4)


@pytest.mark.parametrize("capacity", [LENGTH, 4])
@pytest.mark.parametrize("steps", [1, 2, 7, LENGTH])
def test_cached_in_any_portions_equals_uncached(layer, steps, capacity):
    """A ring wraps with one token at a time and with many, in one call and over several."""
    length = min(LENGTH, capacity)
    x = inputs(length=length)
    expected, _ = layer(x)
    cache, rows, at, call = layer.init_cache(2, capacity, jnp.float32), [], 0, run(layer)
    slots = capacity if layer.window is None else min(capacity, layer.window)
    assert cache.k.shape == cache.v.shape == (2, slots, layer.num_kv_heads, 8)
    while at < length:
        piece = x[:, at : at + steps]
        out, cache = call(piece, cache, length=jnp.full((2,), at, jnp.int32))
        rows.append(out)
        at += piece.shape[1]
    np.testing.assert_allclose(jnp.concatenate(rows, 1), expected, atol=1e-4)


def test_ragged_rows_equal_each_alone(layer):
    """Rows get 8, 3 and 0 tokens, then 1, 6 and 9, then one each."""
    x, call = inputs(batch=3), run(layer)
    cache, read = layer.init_cache(3, LENGTH, jnp.float32), np.zeros(3, np.int32)
    expected, _ = layer(x)
    for count, width in (([8, 3, 0], 9), ([1, 6, 9], 9), ([1, 1, 1], 1), ([0, 1, 0], 1)):
        valid = np.arange(width) < np.array(count)[:, None]
        index = np.minimum(read[:, None] + np.arange(width), LENGTH - 1)
        piece = jnp.take_along_axis(x, index[..., None], axis=1)
        piece = jnp.where(valid[..., None], piece, 1e3)
        out, cache = call(
            piece, cache, length=jnp.asarray(read), segment_ids=valid.astype(np.int32)
        )
        assert np.isfinite(out).all()
        for row in range(3):
            n = count[row]
            np.testing.assert_allclose(
                out[row, :n], expected[row, read[row] : read[row] + n], atol=1e-4
            )
        read = read + np.array(count)


def test_padding_anywhere_counts_nothing(layer):
    """Packed documents equal each alone, with padding left of them, between and inside."""
    x = inputs(batch=1)
    segments = np.array([[0, 0, 7, 7, 0, 7, 7, 7, 7, 7, 0, 2, 2, 2, 7, 7, 7, 7, 7, 7, 7, 0, 0]])
    assert segments.shape[1] == LENGTH
    packed, _ = run(layer)(x, segment_ids=segments)
    assert np.isfinite(packed).all()
    for start, end in ((2, 10), (11, 14), (14, 21)):
        keep = np.flatnonzero(segments[0, start:end]) + start
        alone, _ = layer(x[:, keep])
        np.testing.assert_allclose(packed[:, keep], alone, atol=1e-4)


def test_positions_turn_heads_and_nothing_else(layer):
    """A shift of all positions changes nothing; stretched ones do, where something is turned."""
    x, call = inputs(), run(layer)
    expected, _ = layer(x)
    places = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    shifted, _ = call(x, positions=places + 100)
    np.testing.assert_allclose(shifted, expected, atol=1e-3)
    stretched, _ = call(x, positions=3 * places)
    changes = float(jnp.abs(stretched - expected).max())
    assert (changes > 1e-2) == (layer.rotary_dim is not None)
    cache, at = layer.init_cache(2, LENGTH, jnp.float32), jnp.zeros((2,), jnp.int32)
    out, cache = call(x[:, :9], cache, length=at, positions=3 * places[:, :9])
    np.testing.assert_allclose(out, stretched[:, :9], atol=1e-4)
    out, _ = call(x[:, 9:], cache, length=at + 9, positions=3 * places[:, 9:])
    np.testing.assert_allclose(out, stretched[:, 9:], atol=1e-4)


def test_bfloat16_parameters_and_activations(layer):
    low = nnx.clone(layer)
    nnx.update(low, jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(low)))
    x = inputs()
    same, _ = low(x)
    assert same.dtype == jnp.float32
    out, _ = low(x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    expected, _ = layer(x)
    for found in (same, out):
        error = jnp.sqrt(jnp.mean(jnp.square(found - expected)) / jnp.mean(jnp.square(expected)))
        assert 0 < error < 0.05


MESHES = {
    "same split": (MeshConfig(data=2, fsdp=2, tensor=2), AxisRules(), [2, 4]),
    "keys whole": (MeshConfig(data=2, tensor=4), AxisRules(kv_heads=None), [1, 2, 4]),
    "auto": (MeshConfig(data=4, tensor=2, explicit=False), AxisRules(kv_heads=None), [2, 4]),
    "axis of one": (MeshConfig(data=2, fsdp=4), AxisRules(), [1]),
}


@pytest.mark.parametrize(
    ("mesh", "rules", "kv_heads"),
    [
        pytest.param(mesh, rules, count, id=f"{name}, {count}")
        for name, (mesh, rules, counts) in MESHES.items()
        for count in counts
    ],
)
def test_eight_devices_equal_one(mesh, rules, kv_heads):
    layer = make(num_kv_heads=kv_heads, rotary_dim=8, window=6, softcap=3.0, use_bias=True)
    graphdef, params = split(layer)
    batch = 8
    x = inputs(batch=batch)
    segments = np.ones((batch, LENGTH), np.int32)
    segments[:, 9:] = 2
    segments[::2, :3] = 0

    def loss(params, x, segments):
        out, _ = nnx.merge(graphdef, params)(x, segment_ids=segments)
        return jnp.sum(jnp.where((segments != 0)[..., None], jnp.sin(out), 0))

    def decode(params, x):
        module = nnx.merge(graphdef, params)
        cache, at, outs = module.init_cache(batch, LENGTH, x.dtype), jnp.zeros(batch, jnp.int32), []
        for piece in (x[:, :8], x[:, 8:9], x[:, 9:]):
            out, cache = module(piece, cache, length=at)
            outs.append(out)
            at = at + piece.shape[1]
        return jnp.concatenate(outs, axis=1)

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x, segments)
    mesh = make_mesh(mesh)
    params = jax.device_put(params, shardings(params, param_axes(layer), mesh, rules))
    with use_mesh(mesh, rules):
        rows = jax.NamedSharding(mesh, rules.spec(("batch", "seq")))
        x, segments = jax.device_put(x, rows), jax.device_put(segments, rows)
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x, segments)
        decoded = jax.jit(decode)(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected
    )
    np.testing.assert_allclose(decoded, layer(jnp.asarray(np.asarray(x)))[0], atol=1e-4)


def test_blocks_of_queries_are_sized_by_what_a_device_holds(monkeypatch):
    seen, size = [], xla._query_block
    monkeypatch.setattr(xla, "_query_block", lambda *counts: seen.append(counts) or size(*counts))
    layer = make()
    jax.eval_shape(lambda: layer(inputs(batch=8))[0])
    with use_mesh(make_mesh(MeshConfig(data=4, tensor=2)), AxisRules()):
        jax.eval_shape(lambda: layer(inputs(batch=8))[0])
    assert seen == [(8 * 4, LENGTH), (2 * 2, LENGTH)]


def test_bad_sizes_are_named():
    with pytest.raises(InputError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        make(num_kv_heads=3)
    with pytest.raises(InputError, match="rotary_dim=5 must be even"):
        make(rotary_dim=5)
    with pytest.raises(InputError, match=r"rotary_dim=10 must be even and in 2\.\.head_dim=8"):
        make(rotary_dim=10)
    with pytest.raises(InputError, match="window=0 must be at least 1"):
        make(window=0)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with use_mesh(mesh, AxisRules(heads=None)), pytest.raises(InputError, match=r"rules\.kv_heads"):
        jax.eval_shape(lambda: make()(inputs(batch=8))[0])
