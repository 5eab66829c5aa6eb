"""Attention in blocks, with two views, and over a cache whose slots are overwritten."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope import InputError
from jaxalope.layers.attention import Attention
from jaxalope.sharding import (
    AxisRules,
    MeshConfig,
    make_mesh,
    param_axes,
    shardings,
    split,
    use_mesh,
)

D, LENGTH = 12, 18


def make(block=None, **changes):
    options = {"num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8, "stddev": 0.5, **changes}
    return Attention(D, 4, rngs=nnx.Rngs(0), block=block, **options)


@pytest.fixture(scope="module", params=[None, 1, 4], ids=["one block", "causal", "blocks of 4"])
def layer(request):
    return make(request.param)


def inputs(batch=2, length=LENGTH, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, length, D))


def run(layer):
    """The module, compiled: ``call(x, cache, **arguments)``."""
    graphdef, params = split(layer)

    def forward(params, *args, two_views=False, **kw):
        return nnx.merge(graphdef, params)(*args, two_views=two_views, **kw)

    forward = jax.jit(forward, static_argnames="two_views")
    return lambda *args, **kw: forward(params, *args, **kw)


def lengths(*values):
    return jnp.array(values, jnp.int32)


def at(*rows):
    return jnp.array(rows, jnp.int32)


def test_what_a_token_sees(layer):
    """A change reaches the tokens of its own and later blocks, and no other."""
    x, call = inputs(batch=1), run(layer)
    before, _ = call(x)
    after, _ = call(x.at[:, 6].add(1.0))
    first = {None: 0, 1: 6, 4: 4}[layer.block]
    changed = np.flatnonzero(np.abs(after - before).max((0, 2)))
    assert changed.tolist() == list(range(first, LENGTH))


def test_packed_equals_alone_and_blocks_begin_with_their_document(layer):
    x, call = inputs(batch=1), run(layer)
    segments = np.array([[0, 0, 7, 7, 0, 7, 7, 7, 7, 7, 0, 2, 2, 2, 2, 2, 2, 0]])
    packed, _ = call(x, segment_ids=segments)
    for document in (7, 2):
        keep = np.flatnonzero(segments[0] == document)
        alone, _ = call(x[:, keep])
        np.testing.assert_allclose(packed[:, keep], alone, atol=1e-4)


def test_the_whole_canvas_through_a_cache_equals_without(layer):
    x, call = inputs(), run(layer)
    expected, _ = call(x)
    cache = layer.init_cache(2, LENGTH + 3, jnp.float32)
    out, filled = call(x, cache, length=lengths(0, 0))
    np.testing.assert_allclose(out, expected, atol=1e-4)
    # In any order, and over what another text has left there.
    order = np.random.default_rng(0).permuted(np.tile(np.arange(LENGTH), (2, 1)), axis=1)
    shuffled = jnp.take_along_axis(x, order[..., None], axis=1)
    dirty = jax.tree.map(lambda y: y + 100.0, filled)
    out, again = call(shuffled, dirty, length=lengths(0, 0), slots=order.astype(np.int32))
    np.testing.assert_allclose(
        out, jnp.take_along_axis(expected, order[..., None], axis=1), atol=1e-4
    )
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(filled), strict=True):
        np.testing.assert_allclose(a[:, :LENGTH], b[:, :LENGTH], atol=1e-5)
        np.testing.assert_array_equal(a[:, LENGTH:], b[:, LENGTH:] + 100.0)


def test_some_slots_overwritten_equal_a_forward_over_the_cache_as_it_is(layer):
    """Unchanged tokens give what they gave; changed ones are in one layer as if all were new."""
    x, call = inputs(), run(layer)
    _, cache = call(x, layer.init_cache(2, LENGTH, jnp.float32), length=lengths(0, 0))
    slots, full = at([3, 9, 4], [17, 0, 8]), lengths(LENGTH, LENGTH)
    rows = np.arange(2)[:, None]
    out, same = call(x[rows, slots], cache, length=full, slots=slots)
    np.testing.assert_allclose(out, call(x)[0][rows, slots], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, cache)
    changed = x.at[rows, slots].add(1.0)
    out, written = call(changed[rows, slots], cache, length=full, slots=slots)
    np.testing.assert_allclose(out, call(changed)[0][rows, slots], atol=1e-4)
    # What was overwritten stays, and later queries see it.
    out, _ = call(changed[:, 5:7], written, length=full, slots=at([5, 6], [5, 6]))
    np.testing.assert_allclose(out, call(changed)[0][:, 5:7], atol=1e-4)


def test_padding_of_queries_writes_nothing_and_rows_are_as_alone(layer):
    """Canvases of 10 and 18 tokens; rows ask for one and for three of them, invalid ones aside."""
    x, call = inputs(), run(layer)
    own = np.array([10, LENGTH])
    valid = (np.arange(LENGTH) < own[:, None]).astype(np.int32)
    cache = layer.init_cache(2, LENGTH, jnp.float32)
    everywhere = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))
    out, cache = call(x, cache, length=lengths(0, 0), slots=everywhere, segment_ids=valid)
    alone = [call(x[i : i + 1, :n])[0][0] for i, n in enumerate(own)]
    for i, n in enumerate(own):
        np.testing.assert_allclose(out[i, :n], alone[i], atol=1e-4)
    assert np.abs(np.asarray(cache.k)[0, 10:]).max() == 0
    slots, queries = at([2, 9, 5], [2, 9, 5]), at([0, 3, 0], [1, 3, 1])
    piece = jnp.where((queries == 0)[..., None], 1e3, x[:, slots[0]])
    out, after = call(piece, cache, length=lengths(*own), slots=slots, segment_ids=queries)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[0, 1], alone[0][9], atol=1e-4)
    np.testing.assert_allclose(out[1], alone[1][np.array(slots[1])], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, cache)


def test_a_shorter_length_hides_what_is_behind_it(layer):
    """Going back to 8 tokens; a call fills further slots and sees them."""
    x, call = inputs(), run(layer)
    _, cache = call(x, layer.init_cache(2, LENGTH, jnp.float32), length=lengths(0, 0))
    expected, _ = call(x[:, :12])
    back = lengths(8, 8)
    out, _ = call(x[:, 8:12], cache, length=back, slots=at(*[range(8, 12)] * 2))
    np.testing.assert_allclose(out, expected[:, 8:12], atol=1e-4)
    out, _ = call(x[:, 8:12], cache, length=back)
    np.testing.assert_allclose(out, expected[:, 8:12], atol=1e-4)


def test_blocks_one_after_another_equal_the_forward_of_all():
    """Prefix by blocks, then a block at its slots twice: the last writing is what counts."""
    layer = make(4)
    x, call = inputs(length=16), run(layer)
    expected, _ = call(x)
    cache, rows = layer.init_cache(2, 16, jnp.float32), []
    for start in range(0, 16, 4):
        slots, own = at(*[range(start, start + 4)] * 2), x[:, start : start + 4]
        length = lengths(start, start)
        _, cache = call(own + 1.0, cache, length=length, slots=slots)
        out, cache = call(own, cache, length=length + 4, slots=slots)
        rows.append(out)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), expected, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_two_views_equal_each_noisy_block_behind_its_clean_past(layer, packed):
    block = layer.block or LENGTH
    noisy, clean, call = inputs(), inputs(seed=2), run(layer)
    segments = np.ones((2, LENGTH), np.int32)
    if packed:
        segments[:, 7:] = 2
        segments[0, -2:] = 0
    both = jnp.concatenate([noisy, clean], axis=1)
    out, none = call(both, segment_ids=segments if packed else None, two_views=True)
    assert none is None and np.isfinite(out).all()
    valid = (segments != 0)[..., None]
    expected, _ = call(clean, segment_ids=segments)
    clean_out = np.where(valid, out[:, LENGTH:], 0)
    np.testing.assert_allclose(clean_out, np.where(valid, expected, 0), atol=1e-4)
    for row in range(2):
        for document in set(segments[row]) - {0}:
            own = np.flatnonzero(segments[row] == document)
            for start in range(0, len(own), block):
                here = own[start : start + block]
                text = jnp.concatenate([clean[row, own[:start]], noisy[row, here]])[None]
                alone, _ = call(text)
                np.testing.assert_allclose(out[row, here], alone[0, start:], atol=1e-4)


MESHES = {
    "explicit": (MeshConfig(data=2, fsdp=2, tensor=2), AxisRules()),
    "keys whole": (MeshConfig(data=2, tensor=4), AxisRules(kv_heads=None)),
    "auto": (MeshConfig(data=2, fsdp=2, tensor=2, explicit=False), AxisRules()),
    "sequence": (MeshConfig(data=2, context=4), AxisRules()),
}


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name):
    mesh, rules = MESHES[name]
    layer = make(4)
    graphdef, params = split(layer)
    batch, length = 4, 16
    x, other = inputs(batch, length), inputs(batch, length, seed=2)
    segments = np.ones((batch, length), np.int32)
    segments[:, 6:] = 2
    slots = np.tile(np.arange(3, 7, dtype=np.int32), (batch, 1))

    def loss(params, x, segments):
        both = jnp.concatenate([x, jnp.cos(x)], axis=1)
        out, _ = nnx.merge(graphdef, params)(both, segment_ids=segments, two_views=True)
        return jnp.sum(jnp.sin(out))

    def denoise(params, x, slots):
        module = nnx.merge(graphdef, params)
        cache = module.init_cache(batch, length, x.dtype)
        _, cache = module(x, cache, length=jnp.zeros(batch, jnp.int32))
        return module(x[:, :4], cache, length=jnp.full(batch, length), slots=slots)[0]

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x, segments)
    expected_rows = jax.jit(denoise)(params, other, slots)
    mesh = make_mesh(mesh)
    params = jax.device_put(params, shardings(params, param_axes(layer), mesh, rules))
    with use_mesh(mesh, rules):
        rows = jax.NamedSharding(mesh, rules.spec(("batch",)))
        x, segments, other, slots = (jax.device_put(y, rows) for y in (x, segments, other, slots))
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x, segments)
        found_rows = jax.jit(denoise)(params, other, slots)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected
    )
    np.testing.assert_allclose(found_rows, expected_rows, atol=1e-4)


def test_bad_calls_are_named():
    with pytest.raises(InputError, match="block=0 must be at least 1"):
        make(0)
    with pytest.raises(InputError, match="window=4 is of causal attention"):
        make(None, window=4)
    layer, x = make(), inputs()
    with pytest.raises(InputError, match="slots are of a cache"):
        layer(x, slots=jnp.zeros((2, LENGTH), jnp.int32))
    cache, start = layer.init_cache(2, LENGTH, jnp.float32), lengths(0, 0)
    with pytest.raises(InputError, match="two_views are without a cache"):
        layer(x, cache, length=start, two_views=True)
    ring = make(1, window=4)
    with pytest.raises(InputError, match="ring takes tokens in their order"):
        ring(x, ring.init_cache(2, LENGTH, jnp.float32), length=start, slots=at(*[range(18)] * 2))
