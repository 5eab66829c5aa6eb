"""One matrix of tests for every implementation of KDA: each equals the oracle, whatever it is for.

Pallas kernels are interpreted on a CPU and run as they are on their chip (`make test-device`). What
is particular to a chip is tested in a file of its own.
"""

import jax
import jax.numpy as jnp
import kda_cases
import numpy as np
import pytest
from kda_cases import (
    FIXTURES,
    INPUTS,
    close,
    draw_heads,
    low_precision,
    relative_rms,
    run,
    value_and_grads,
)

from jaxalope.sharding import AxisRules, kernel_map, use_rules

pytestmark = pytest.mark.long


@pytest.fixture(params=["xla", "pallas_tpu", "pallas_gpu"])
def implementation(request, monkeypatch):
    """A name that runs here."""
    kda_cases.interpret(monkeypatch, request.param)
    return request.param


# Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, chunk_size, decay",
    [
        (1, 64, "strong"),
        (40, 16, "bounded"),
        (70, 32, "strong"),
        (130, 128, "strong"),
    ],
)
def test_any_length_and_chunk_equals_recurrence(implementation, length, chunk_size, decay):
    arrays, cotangents = draw_heads(length, decay=decay)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    got = value_and_grads(arrays, cotangents, chunk_size=chunk_size, implementation=implementation)
    jax.tree.map(lambda g, w: np.testing.assert_equal(g.dtype, w.dtype), got, want)
    close(got, want, 1e-5)


@pytest.mark.parametrize("case", ["a_basic", "c_strong_decay"])
def test_goldens(implementation, case):
    golden = np.load(FIXTURES / f"kda_naive_{case}.npz")
    arrays = tuple(jnp.asarray(golden[name]) for name in INPUTS)
    out, grads = value_and_grads(
        arrays, (golden["w"], golden["u"]), chunk_size=16, implementation=implementation
    )
    close(out, (golden["o"], golden["final_state"]), 1e-4)
    for name, grad in zip(INPUTS, grads, strict=True):
        close(grad, golden[f"grad_{name}"], 5e-4 if name in ("g", "beta") else 2e-4)


@pytest.mark.parametrize("heads, value_heads", [(2, 2), (1, 4), (1, 3), (2, 4)])
def test_groups_of_value_heads_read_their_key_head(implementation, heads, value_heads):
    """Two heads a step or one, that share their q/k head or not, alone or with other steps."""
    arrays, cotangents = draw_heads(9, heads=heads, value_heads=value_heads)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    close(value_and_grads(arrays, cotangents, implementation=implementation), want, 1e-5)


ROWS = [
    [(1, 21), (2, 19)],
    [(1, 16), (2, 16), (3, 8)],
    [(1, 3), (2, 1), (3, 5), (1, 2), (2, 19), (3, 10)],
    [(0, 19), (4, 10), (2, 11)],
    [(4, 10), (2, 11), (0, 19)],
    [(1, 7), (0, 20), (2, 9), (0, 1), (5, 3)],
    [(0, 40)],
]


def test_packed_rows_equal_recurrence(implementation):
    segment_ids = jnp.asarray([[i for i, count in row for _ in range(count)] for row in ROWS])
    arrays, cotangents = draw_heads(40, batch=len(ROWS))
    want = value_and_grads(arrays, cotangents, segment_ids, implementation="reference")
    close(
        value_and_grads(
            arrays, cotangents, segment_ids, chunk_size=16, implementation=implementation
        ),
        want,
        1e-5,
    )


def test_bfloat16_within_the_published_tolerances(implementation):
    arrays, cotangents = draw_heads(130, key=16, value=16, decay="bounded")
    low = (*(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:])
    exact = (*(x.astype(jnp.float32) for x in low[:3]), *arrays[3:])
    want = value_and_grads(exact, cotangents, implementation="reference")
    out, grads = value_and_grads(low, cotangents, implementation=implementation)
    assert out[0].dtype == jnp.bfloat16 and out[1].dtype == jnp.float32
    assert [x.dtype for x in grads] == [x.dtype for x in low]
    for got, expected in zip(out, want[0], strict=True):
        assert relative_rms(got, expected) < 5e-3
    for name, got, expected in zip(INPUTS, grads, want[1], strict=True):
        assert relative_rms(got, expected) < (2e-2 if name in ("g", "beta") else 8e-3), name


@pytest.mark.parametrize("decay", ["strong", "bounded"])
def test_the_gates_gradient_in_bfloat16_is_as_exact_as_others(implementation, decay):
    """As a sum over what a decay acts on; as a difference it is three to five times worse."""
    arrays, cotangents = draw_heads(128, key=32, value=32, decay=decay)
    low = low_precision(arrays)
    exact = (*(x.astype(jnp.float32) for x in low[:3]), *low[3:])
    want = value_and_grads(exact, cotangents, implementation="reference")[1]
    got = value_and_grads(low, cotangents, implementation=implementation)[1]
    assert relative_rms(got[3], want[3]) < 1e-2


def test_repeated_keys_written_at_full_strength(implementation):
    """Worst case of the triangular inverse: L is all ones, and its powers reach 10^18."""
    (q, k, v, g, beta, state), cotangents = draw_heads(64)
    k, g, beta = jnp.broadcast_to(k[:, :1], k.shape), jnp.zeros_like(g), jnp.ones_like(beta)
    arrays = (q, k, v, g, beta, state)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    got = value_and_grads(arrays, cotangents, implementation=implementation)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_rms(g, w) < 1e-4


# Transforms ----------------------------------------------------------------------------------


def test_vmap_remat_and_scan(implementation):
    arrays, cotangents = draw_heads(20, batch=2)
    want = value_and_grads(arrays, cotangents, implementation="reference")

    def loss(arrays):
        out = run(arrays, chunk_size=16, implementation=implementation)
        return sum(jnp.sum(o * c) for o, c in zip(out, cotangents, strict=True))

    def stacked(arrays):
        def layer(total, arrays):
            return total + jax.checkpoint(loss)(arrays), None

        return jax.lax.scan(layer, 0.0, jax.tree.map(lambda x: jnp.stack([x, x]), arrays))[0]

    close(jax.jit(jax.grad(stacked))(arrays), jax.tree.map(lambda x: 2 * x, want[1]), 1e-5)
    rows = jax.tree.map(lambda x: x[:, None], arrays)
    by_row = jax.jit(jax.vmap(lambda a: run(a, chunk_size=16, implementation=implementation)))(rows)
    close(jax.tree.map(lambda x: x[:, 0], by_row), want[0], 1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_eight_devices_equal_one(implementation):
    mesh = jax.make_mesh((4, 2, 1), ("data", "tensor", "expert"))
    rules = AxisRules(batch="data", heads=("tensor", "expert"))
    arrays, cotangents = draw_heads(20, batch=4, heads=2, value_heads=2)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    tokens, state = ("batch", None, "heads", None), ("batch", "heads", None, None)

    @jax.jit
    def both(arrays, cotangents):
        local = kernel_map(
            lambda *a: run(a, chunk_size=16, implementation=implementation),
            (*(tokens,) * 4, tokens[:3], state),
            (tokens, state),
        )
        out, pullback = jax.vjp(local, *arrays)
        return out, pullback(cotangents)

    with jax.set_mesh(mesh), use_rules(rules):
        close(both(arrays, cotangents), want, 1e-5)
