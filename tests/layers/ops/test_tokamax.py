"""``implementation="tokamax"`` against our references, and what it says where it cannot run."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalope import InputError
from jaxalope.layers.ops.attention import attention
from jaxalope.layers.ops.grouped_matmul import grouped_matmul, grouped_swiglu
from jaxalope.layers.ops.kda import bounded_gate, kda, l2norm
from jaxalope.layers.ops.kda.tokamax_tpu import kda_tokamax
from jaxalope.layers.ops.linear_cross_entropy import linear_cross_entropy
from jaxalope.sharding import MeshConfig, make_mesh, use_mesh

installed = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed"
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(actual, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def both(run, *arrays):
    """Values and gradients by tokamax and by the reference."""

    def one(implementation):
        out, pull = jax.vjp(lambda *a: run(*a, implementation=implementation), *arrays)
        return out, pull(jax.tree.map(jnp.sin, out))

    return one("tokamax"), one("reference")


def kda_inputs(length, heads=1, key=16, value=24):
    q, k = (l2norm(normal(i, 1, length, heads, key)) for i in (0, 1))
    g = bounded_gate(normal(3, 1, length, heads, key), jnp.zeros(heads))
    beta = jax.nn.sigmoid(normal(4, 1, length, heads))
    return q, k, normal(2, 1, length, heads, value), g, beta, normal(5, 1, heads, key, value)


def head_inputs():
    targets = jax.random.randint(jax.random.key(2), (2, 11), 0, 24)
    weights = jax.random.uniform(jax.random.key(3), (2, 11))
    return normal(0, 2, 11, 16), normal(1, 24, 16), targets, weights


def cross_entropy(hidden, kernel, *labels, **settings):
    settings = {"vocab_first": True, "accuracy": False} | settings
    return linear_cross_entropy(hidden, kernel, *labels, **settings)


@installed
def test_kda_of_a_bounded_gate(monkeypatch):
    """Its kernels in interpret mode, for a chip that is not there; a last chunk that is padded."""
    monkeypatch.setenv("PALLAS_INTERPRET", "1")
    arrays = kda_inputs(100)
    chip = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")

    @jax.jit
    def theirs(*arrays):
        def run(*arrays):
            return kda_tokamax(
                *arrays, None, scale=0.25, chunk_size=64, gate_lower_bound=-5.0, interpret=True
            )

        out, pull = jax.vjp(run, *arrays)
        return out, pull(jax.tree.map(jnp.sin, out))

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip)):
        found = theirs(*arrays)
    *tokens, state = arrays
    out, pull = jax.vjp(
        lambda *a: kda(*a[:-1], initial_state=a[-1], implementation="reference"), *tokens, state
    )
    close(found, (out, pull(jax.tree.map(jnp.sin, out))), 1e-4)


@installed
def test_kda_elsewhere_than_on_tpu_is_an_error():
    with pytest.raises(InputError, match=r"is being traced on another device than a TPU"):
        jax.jit(lambda *a: kda(*a, implementation="tokamax", gate_lower_bound=-5.0)).lower(
            *kda_inputs(64)[:5]
        )


def test_kda_names_what_it_cannot_take():
    *tokens, _ = kda_inputs(64)
    with pytest.raises(InputError, match="is of the bounded gate; give gate_lower_bound=-5"):
        kda(*tokens, implementation="tokamax")
    with pytest.raises(InputError, match=r"gate_lower_bound=-9.0 is not in \[-5, 0\)"):
        kda(*tokens, implementation="tokamax", gate_lower_bound=-9.0)
    with pytest.raises(InputError, match="segment_ids are not supported"):
        segments = jnp.ones((1, 64), jnp.int32)
        kda(*tokens, implementation="tokamax", gate_lower_bound=-5.0, segment_ids=segments)


@installed
@pytest.mark.parametrize("sizes", [[3, 17, 0, 20], [4, 9, 1, 6]], ids=["all", "rows past the last"])
def test_grouped_products(sizes):
    sizes = jnp.asarray(sizes, jnp.int32)
    x, gate, up, down = (
        normal(0, 40, 12),
        *(normal(i, 4, 12, 10) for i in (1, 2)),
        normal(3, 4, 10, 12),
    )
    close(*both(lambda x, w, **k: grouped_matmul(x, w, sizes, **k), x, gate), 1e-4)
    close(*both(lambda *a, **k: grouped_swiglu(*a, sizes, **k), x, gate, up, down), 2e-3)


@installed
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_grouped_products_are_kernels_where_the_tpu_is_not_here(topology, absent_slice):
    """Left to itself tokamax would look at this host, and compile XLA's form."""
    device = absent_slice(topology)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("device",), auto, devices=[device])

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    wide, narrow = (4, 256, 128), (4, 128, 256)
    weights = (array(jnp.float32, *shape) for shape in (wide, wide, narrow))

    def both(sizes, *arrays):
        run = lambda *a: grouped_swiglu(*a, sizes, implementation="tokamax")  # noqa: E731
        y, pull = jax.vjp(run, *arrays)
        return y, pull(y)

    arrays = (array(jnp.int32, 4), array(jnp.bfloat16, 512, 256), *weights)
    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(*arrays).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 9 and "ragged-dot" not in text


@installed
def test_cross_entropy():
    hidden, kernel, *labels = head_inputs()
    run = lambda h, w, **k: cross_entropy(h, w, *labels, **k)[0]  # noqa: E731
    close(*both(run, hidden, kernel))
    found, expected = (
        cross_entropy(hidden, kernel, *labels, implementation=i)[1]
        for i in ("tokamax", "reference")
    )
    close(found, expected)


@installed
def test_cross_entropy_on_a_mesh():
    hidden, kernel, *labels = head_inputs()
    grad = jax.grad(
        lambda h, w: cross_entropy(h, w, *labels, implementation="tokamax")[0], argnums=(0, 1)
    )
    alone = grad(hidden, kernel)
    with use_mesh(make_mesh(MeshConfig(data=2, tensor=1), jax.devices()[:2])):
        close(jax.jit(grad)(hidden, kernel), alone)
    split = use_mesh(make_mesh(MeshConfig(tensor=2), jax.devices()[:2]))
    with split, pytest.raises(InputError, match="cannot take a vocabulary split over"):
        jax.jit(grad)(hidden, kernel)


def test_cross_entropy_names_what_it_cannot_take():
    with pytest.raises(InputError, match="cannot take softcap, z_loss, accuracy; turn it off"):
        cross_entropy(
            *head_inputs(), softcap=3.0, z_loss=0.1, accuracy=True, implementation="tokamax"
        )


@installed
@pytest.mark.parametrize(
    "more",
    [{}, {"softcap": 1.0, "window": 5}, {"block": 4}, {"views": True, "block": 4}],
    ids=["causal", "window and cap", "blocks", "views"],
)
def test_attention(more):
    """Packed, with grouped heads and unequal widths."""
    more = dict(more)
    places = jnp.broadcast_to(jnp.arange(13), (2, 13))
    segments = places // 5
    where = {"query_positions": places, "key_positions": places}
    where |= {"query_segments": segments, "key_segments": segments}
    if more.pop("views", False):
        where |= {"query_noisy": places % 5 < 3, "key_noisy": places % 5 < 3}
    arrays = normal(0, 2, 13, 4, 8), normal(1, 2, 13, 2, 8), normal(2, 2, 13, 2, 6)
    close(*both(lambda *a, **k: attention(*a, **where, **more, scale=0.6, **k), *arrays), 1e-4)


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is not None, reason="it is installed")
def test_where_it_is_not_installed_the_remedy_is_named():
    places = jnp.zeros((1, 2), jnp.int32)
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 2], jnp.int32)
    qkv = (jnp.ones((1, 2, 1, 4)),) * 3
    calls = {
        "kda": lambda **k: kda(*kda_inputs(64)[:5], gate_lower_bound=-5.0, **k),
        "grouped_matmul": lambda **k: grouped_matmul(x, w, sizes, **k),
        "linear_cross_entropy": lambda **k: cross_entropy(*head_inputs(), **k),
        "attention": lambda **k: attention(*qkv, query_positions=places, key_positions=places, **k),
    }
    for name, call in calls.items():
        with pytest.raises(InputError, match=rf"{name}: .*pip install jaxalope\[kernels\]"):
            call(implementation="tokamax")
