"""Attention against its oracle: grouped heads, unequal widths, segments, long queries, bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalope import InputError
from jaxalope.layers.ops.attention import Marks, attention, xla
from jaxalope.layers.ops.attention.mask import visible


def inputs(batch=2, queries=9, keys=9, heads=4, groups=2, width=8, values=6, dtype=jnp.float32):
    k = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(k[0], (batch, queries, heads, width), dtype)
    key = jax.random.normal(k[1], (batch, keys, groups, width), dtype)
    v = jax.random.normal(k[2], (batch, keys, groups, values), dtype)
    offset = keys - queries
    q_pos = jnp.broadcast_to(offset + jnp.arange(queries), (batch, queries))
    k_pos = jnp.broadcast_to(jnp.arange(keys), (batch, keys))
    return (q, key, v), {"query_positions": q_pos, "key_positions": k_pos}


@pytest.mark.parametrize(
    "shape",
    [{}, {"groups": 1}, {"groups": 4}, {"queries": 1, "keys": 13}, {"queries": 530, "keys": 530}],
    ids=["grouped", "one group", "own keys", "decode", "blocks of queries"],
)
def test_equals_reference(shape):
    arrays, where = inputs(**shape)

    def loss(implementation):
        def run(*arrays):
            out = attention(*arrays, **where, scale=0.3, implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*arrays)

    (_, found), grads = loss("xla")
    (_, expected), expected_grads = loss("reference")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "keys", "expected"),
    [
        (32, 4096, 512),
        (32, 2**14, 512),
        (32, 2**14 + 1, 256),
        (32, 2**17, 64),
        (32, 2**20, 16),
        (1024, 2**20, 16),
        (8, 5, 512),
    ],
)
def test_long_keys_make_blocks_of_queries_smaller(rows, keys, expected):
    """A gibibyte of scores a device, but for the smallest block; Kimi Linear 48B has 32 heads."""
    assert xla._query_block(rows, keys) == expected


@pytest.mark.parametrize("length", [16, 17, 45, 64])
def test_small_blocks_equal_one(length, monkeypatch):
    """Lengths that do and do not divide, packed, values and every gradient."""
    arrays, where = inputs(queries=length, keys=length + 6)
    segments = jnp.broadcast_to(jnp.arange(length + 6) // 11, (2, length + 6))
    where |= {"query_segments": segments[:, 6:], "key_segments": segments}

    def run(*arrays):
        out = attention(*arrays, **where, implementation="xla")
        return jnp.sum(jnp.sin(out)), out

    def outputs():
        # A function of its own, or a compiled one would be found.
        run_once = jax.value_and_grad(lambda *x: run(*x), argnums=(0, 1, 2), has_aux=True)
        (_, out), grads = jax.jit(run_once)(*arrays)
        return out, grads

    one = outputs()
    blocks = []
    monkeypatch.setattr(xla, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(xla, "visible", lambda q, k, **kw: blocks.append(q) or visible(q, k, **kw))
    small = outputs()
    assert {marks.positions.shape for marks in blocks} == {(2, 16)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), small, one)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("shape", [{"groups": 1}, {"queries": 3, "keys": 13}, {"queries": 530}])
def test_window_and_softcap_equal_reference(shape, window, softcap):
    """Packed, with grouped heads, across blocks of queries; scores far beyond the cap."""
    (q, k, v), where = inputs(batch=2, **{"keys": shape.get("queries", 9), **shape})
    segments = jnp.broadcast_to(jnp.arange(k.shape[1]) // 7, k.shape[:2])
    settings = {
        **where,
        "query_segments": segments[:, -q.shape[1] :],
        "key_segments": segments,
        "scale": 2.0,
        "window": window,
        "softcap": softcap,
    }

    def loss(implementation):
        def run(*arrays):
            out = attention(*arrays, **settings, implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, found), grads = loss("xla")
    (_, expected), expected_grads = loss("reference")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_window_and_softcap_equal_their_formula(implementation):
    """One row at a time in numpy: the key at a distance of ``window`` is hidden."""
    (q, k, v), where = inputs(batch=1, heads=1, groups=1)
    out = attention(
        q, k, v, **where, scale=0.7, window=4, softcap=1.5, implementation=implementation
    )
    q, k, v = (np.asarray(x)[0, :, 0] for x in (q, k, v))
    for i in range(9):
        seen = slice(max(0, i - 3), i + 1)
        weights = np.exp(1.5 * np.tanh(0.7 * k[seen] @ q[i] / 1.5))
        np.testing.assert_allclose(out[0, i, 0], weights @ v[seen] / weights.sum(), atol=1e-5)


def by_rule(q, k, v, sees, scale=0.7):
    """One head, one query at a time, in numpy: query ``i`` reads the keys ``sees(i)``."""
    q, k, v = (np.asarray(x)[0, :, 0] for x in (q, k, v))
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        weights = np.exp(scale * k[sees(i)] @ q[i])
        out[i] = weights @ v[sees(i)] / weights.sum()
    return out


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("block", [None, 2, 4, 9])
def test_blocks_equal_their_formula(implementation, block):
    (q, k, v), where = inputs(batch=1, heads=1, groups=1)
    out = attention(q, k, v, **where, scale=0.7, block=block, implementation=implementation)
    end = 9 if block is None else block
    expected = by_rule(q, k, v, lambda i: slice(0, (i // end + 1) * end))
    np.testing.assert_allclose(out[0, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize("block", [None, 1, 4])
@pytest.mark.parametrize("shape", [{}, {"queries": 3, "keys": 13}, {"queries": 530, "keys": 530}])
@pytest.mark.parametrize("noisy", [False, True])
def test_blocks_and_views_equal_reference(shape, block, noisy):
    """Packed, with grouped heads, across blocks of queries."""
    (q, k, v), where = inputs(**shape)
    keys, queries = k.shape[1], q.shape[1]
    segments = jnp.broadcast_to(jnp.arange(keys) // 5, k.shape[:2])
    settings = {**where, "query_segments": segments[:, -queries:], "key_segments": segments}
    if noisy:
        view = jnp.broadcast_to(jnp.arange(keys) % 5 < 3, k.shape[:2])
        settings |= {"query_noisy": view[:, -queries:], "key_noisy": view}

    def loss(implementation):
        def run(*arrays):
            out = attention(*arrays, **settings, block=block, implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, found), grads = loss("xla")
    (_, expected), expected_grads = loss("reference")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_two_views_are_masked_as_published(fixtures):
    """The mask of block diffusion over 8 noisy and 8 clean tokens, in blocks of 4."""
    expected = np.load(fixtures / "llada_tiny/loss.npz")["block_mask_n8_b4"]
    places = jnp.tile(jnp.arange(8), 2)[None]
    marks = Marks(places, None, (jnp.arange(16) < 8)[None])
    np.testing.assert_array_equal(visible(marks, marks, window=None, block=4)[0], expected)
    # In one block the noisy view sees itself alone.
    whole = visible(marks, marks, window=None, block=None)[0]
    np.testing.assert_array_equal(whole, np.kron(np.eye(2), np.ones((8, 8))).astype(bool))


def test_segments_do_not_see_each_other():
    arrays, where = inputs(batch=1)
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1, -1, -1]])
    out = attention(*arrays, **where, query_segments=segments, key_segments=segments)
    for start, end in ((0, 3), (3, 7)):
        part = tuple(x[:, start:end] for x in arrays)
        alone = attention(*part, **{name: p[:, start:end] for name, p in where.items()})
        np.testing.assert_allclose(out[:, start:end], alone, atol=1e-5)


def test_a_query_without_keys_is_finite():
    (q, k, v), where = inputs()
    where["query_positions"] = where["query_positions"] - 100
    grads = jax.grad(lambda *a: jnp.sum(attention(*a, **where)), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("more", [{}, {"window": 4, "softcap": 2.0}])
def test_bfloat16(more):
    arrays, where = inputs(dtype=jnp.bfloat16)
    found = attention(*arrays, **where, **more)
    expected = attention(*(x.astype(jnp.float32) for x in arrays), **where, **more)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=3e-2)


def test_bad_calls_are_named():
    arrays, where = inputs(heads=4, groups=3)
    with pytest.raises(InputError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        attention(*arrays, **where)
    arrays, where = inputs()
    with pytest.raises(InputError, match="implementation='flash'"):
        attention(*arrays, **where, implementation="flash")
    with pytest.raises(InputError, match="window=0 must be positive"):
        attention(*arrays, **where, window=0)
    with pytest.raises(InputError, match=r"softcap=-1\.0 must be positive"):
        attention(*arrays, **where, softcap=-1.0)
    for block in (0, -4):
        with pytest.raises(InputError, match=f"block={block} must be positive"):
            attention(*arrays, **where, block=block)
    for block in (None, 4):
        with pytest.raises(InputError, match=rf"window=3 is of causal attention .*block={block}"):
            attention(*arrays, **where, block=block, window=3)
    with pytest.raises(InputError, match="query_noisy and key_noisy both"):
        attention(*arrays, **where, key_noisy=where["key_positions"] > 3)
