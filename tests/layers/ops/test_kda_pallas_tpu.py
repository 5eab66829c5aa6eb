"""The TPU kernels of KDA: interpreted against the oracle, and compiled for TPUs that are absent."""

import functools

import jax
import jax.numpy as jnp
import kda_cases
import numpy as np
import pytest
from kda_cases import FIXTURES, INPUTS, close, relative_rms

import jaxalope.layers.ops.kda as kda_module
from jaxalope.errors import InputError
from jaxalope.layers.ops.kda import kda, l2norm, pallas_tpu
from jaxalope.sharding import AxisRules, kernel_map, use_rules

run = functools.partial(kda_cases.run, implementation="pallas_tpu")
value_and_grads = functools.partial(kda_cases.value_and_grads, implementation="pallas_tpu")


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels under their public name, run by XLA on this host."""
    run = functools.partial(pallas_tpu.kda_pallas_tpu, interpret=True)
    monkeypatch.setitem(kda_module._IMPLEMENTATIONS, "pallas_tpu", run)


def draw(length, batch=1, heads=1, value_heads=1, key=5, value=7, decay="strong"):
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


# Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, chunk_size, decay",
    [
        (1, 64, "strong"),
        (40, 16, "bounded"),
        (70, 32, "strong"),
        (70, 64, "strong"),
        (130, 128, "strong"),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_any_length_and_chunk_equals_recurrence(length, chunk_size, decay):
    arrays, cotangents = draw(length, decay=decay)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    got = value_and_grads(arrays, cotangents, chunk_size=chunk_size)
    jax.tree.map(lambda g, w: np.testing.assert_equal(g.dtype, w.dtype), got, want)
    close(got, want, 1e-5)


@pytest.mark.parametrize("case", ["a_basic", "c_strong_decay"])
@pytest.mark.usefixtures("interpreted")
def test_goldens(case):
    golden = np.load(FIXTURES / f"kda_naive_{case}.npz")
    arrays = tuple(jnp.asarray(golden[name]) for name in INPUTS)
    out, grads = value_and_grads(arrays, (golden["w"], golden["u"]), chunk_size=16)
    close(out, (golden["o"], golden["final_state"]), 1e-4)
    for name, grad in zip(INPUTS, grads, strict=True):
        close(grad, golden[f"grad_{name}"], 5e-4 if name in ("g", "beta") else 2e-4)


@pytest.mark.parametrize("heads, value_heads", [(2, 2), (1, 4), (1, 3), (2, 4)])
@pytest.mark.usefixtures("interpreted")
def test_groups_of_value_heads_read_their_key_head(heads, value_heads):
    """Two heads a step or one, that share their q/k head or not, alone or with other steps."""
    arrays, cotangents = draw(9, heads=heads, value_heads=value_heads)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    close(value_and_grads(arrays, cotangents), want, 1e-5)


ROWS = [
    [(1, 21), (2, 19)],
    [(1, 16), (2, 16), (3, 8)],
    [(1, 3), (2, 1), (3, 5), (1, 2), (2, 19), (3, 10)],
    [(0, 19), (4, 10), (2, 11)],
    [(4, 10), (2, 11), (0, 19)],
    [(1, 7), (0, 20), (2, 9), (0, 1), (5, 3)],
    [(0, 40)],
]


@pytest.mark.usefixtures("interpreted")
def test_packed_rows_equal_recurrence():
    segment_ids = jnp.asarray([[i for i, count in row for _ in range(count)] for row in ROWS])
    arrays, cotangents = draw(40, batch=len(ROWS))
    want = value_and_grads(arrays, cotangents, segment_ids, implementation="reference")
    close(value_and_grads(arrays, cotangents, segment_ids, chunk_size=16), want, 1e-5)


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_within_the_published_tolerances():
    arrays, cotangents = draw(130, key=16, value=16, decay="bounded")
    low = (*(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:])
    exact = (*(x.astype(jnp.float32) for x in low[:3]), *arrays[3:])
    want = value_and_grads(exact, cotangents, implementation="reference")
    out, grads = value_and_grads(low, cotangents)
    assert out[0].dtype == jnp.bfloat16 and out[1].dtype == jnp.float32
    assert [x.dtype for x in grads] == [x.dtype for x in low]
    for got, expected in zip(out, want[0], strict=True):
        assert relative_rms(got, expected) < 5e-3
    for name, got, expected in zip(INPUTS, grads, want[1], strict=True):
        assert relative_rms(got, expected) < (2e-2 if name in ("g", "beta") else 8e-3), name


@pytest.mark.usefixtures("interpreted")
def test_repeated_keys_written_at_full_strength():
    """Worst case of the triangular inverse: L is all ones, and its powers reach 10^18."""
    (q, k, v, g, beta, state), cotangents = draw(64)
    k, g, beta = jnp.broadcast_to(k[:, :1], k.shape), jnp.zeros_like(g), jnp.ones_like(beta)
    arrays = (q, k, v, g, beta, state)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    got = value_and_grads(arrays, cotangents)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_rms(g, w) < 1e-4


# Transforms ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted")
def test_vmap_remat_and_scan():
    arrays, cotangents = draw(20, batch=2)
    want = value_and_grads(arrays, cotangents, implementation="reference")

    def loss(arrays):
        out = run(arrays, chunk_size=16)
        return sum(jnp.sum(o * c) for o, c in zip(out, cotangents, strict=True))

    def stacked(arrays):
        def layer(total, arrays):
            return total + jax.checkpoint(loss)(arrays), None

        return jax.lax.scan(layer, 0.0, jax.tree.map(lambda x: jnp.stack([x, x]), arrays))[0]

    close(jax.jit(jax.grad(stacked))(arrays), jax.tree.map(lambda x: 2 * x, want[1]), 1e-5)
    rows = jax.tree.map(lambda x: x[:, None], arrays)
    by_row = jax.jit(jax.vmap(lambda a: run(a, chunk_size=16)))(rows)
    close(jax.tree.map(lambda x: x[:, 0], by_row), want[0], 1e-5)


@pytest.mark.usefixtures("interpreted")
def test_eight_devices_equal_one():
    mesh = jax.make_mesh((4, 2, 1), ("data", "tensor", "expert"))
    rules = AxisRules(batch="data", heads=("tensor", "expert"))
    arrays, cotangents = draw(20, batch=4, heads=2, value_heads=2)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    tokens, state = ("batch", None, "heads", None), ("batch", "heads", None, None)

    @jax.jit
    def both(arrays, cotangents):
        local = kernel_map(
            lambda *a: run(a, chunk_size=16),
            (*(tokens,) * 4, tokens[:3], state),
            (tokens, state),
        )
        out, pullback = jax.vjp(local, *arrays)
        return out, pullback(cotangents)

    with jax.set_mesh(mesh), use_rules(rules):
        close(both(arrays, cotangents), want, 1e-5)


# Where they run and where not ----------------------------------------------------------------


def test_another_platform_is_named_when_lowering():
    arrays, _ = draw(9)
    for call in (run, jax.jit(run), jax.grad(lambda a: jnp.sum(run(a)[0]))):
        with pytest.raises(InputError, match='"pallas_tpu" is being lowered for cpu: use impl'):
            call(arrays)
    lowered = jax.jit(run).trace(arrays).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 1


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_the_kernels_do_not_take_is_named():
    (q, k, v, g, beta, _), _ = draw(9)
    named = functools.partial(kda, implementation="pallas_tpu")
    with pytest.raises(InputError, match=r"v has dtype float16.*cast it"):
        named(q, k, v.astype(jnp.float16), g, beta)
    with pytest.raises(InputError, match="wider than 256"):
        named(*(jnp.zeros((1, 9, 1, 257)) for _ in range(4)), beta)
    with jax.enable_x64(True), pytest.raises(InputError, match="g has dtype float64"):
        named(q, k, v, np.asarray(g, np.float64), beta)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_both_passes_compile_ahead_of_time(topology, monkeypatch):
    """Needs libtpu (`pip install jaxalope[tpu]`), and no TPU."""
    pytest.importorskip("libtpu")
    # Several processes may compile at once: none of them holds a TPU.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    arrays, cotangents = draw(100, heads=2, value_heads=4, key=128, value=64)
    arrays = (*(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:])
    cotangents = (cotangents[0].astype(jnp.bfloat16), cotangents[1])

    def both(arrays, cotangents, segment_ids):
        out, pullback = jax.vjp(lambda *a: run(a, segment_ids), *arrays)
        return out, pullback(cotangents)

    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (arrays, cotangents, jnp.ones((1, 100), jnp.int32)),
    )
    compiled = jax.jit(both).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
