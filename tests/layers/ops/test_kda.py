"""KDA against its oracle and the goldens: values, gradients, packing, states, transforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import lowered
from kda_cases import FIXTURES, INPUTS, close, relative_rms, run, value_and_grads

import jaxalope.layers.ops.kda as kda_module
import jaxalope.layers.ops.kda.xla as kda_xla_module
from jaxalope.errors import InputError
from jaxalope.layers.ops.kda import bounded_gate, kda, kda_step, l2norm, softplus_gate
from jaxalope.layers.ops.kda.shapes import SHAPES


def draw(shape="tiny", batch=1, length=32, decay="mixed", seed=0):
    """q, k, v, g, beta, initial_state, and cotangents of o and of the final state."""
    s, rng = SHAPES[shape], np.random.default_rng(seed)

    def normal(*dims):
        return jnp.asarray(rng.normal(size=dims), jnp.float32)

    heads, value_heads = s.num_heads, s.num_value_heads
    g_shape = (batch, length, value_heads, s.key_dim)
    g = {
        "none": lambda: np.zeros(g_shape),
        "mixed": lambda: -np.exp(rng.normal(size=g_shape) * 2 - 1),
        "strong": lambda: -np.exp(rng.uniform(np.log(1e-3), np.log(300.0), size=g_shape)),
        "bounded": lambda: -5.0 * rng.uniform(size=g_shape),
    }[decay]()
    arrays = (
        l2norm(normal(batch, length, heads, s.key_dim)),
        l2norm(normal(batch, length, heads, s.key_dim)),
        normal(batch, length, value_heads, s.value_dim),
        jnp.asarray(g, jnp.float32),
        jax.nn.sigmoid(normal(batch, length, value_heads)),
        normal(batch, value_heads, s.key_dim, s.value_dim),
    )
    cotangents = (
        normal(batch, length, value_heads, s.value_dim),
        normal(batch, value_heads, s.key_dim, s.value_dim),
    )
    return arrays, cotangents


# Values against what others computed ---------------------------------------------------------


@pytest.mark.parametrize("case", ["a_basic", "c_strong_decay"])
def test_the_oracle_agrees_with_goldens(case):
    golden = np.load(FIXTURES / f"kda_naive_{case}.npz")
    arrays = tuple(jnp.asarray(golden[name]) for name in INPUTS)
    out, grads = value_and_grads(arrays, (golden["w"], golden["u"]), implementation="reference")
    close(out, (golden["o"], golden["final_state"]), 1e-4)
    for name, grad in zip(INPUTS, grads, strict=True):
        close(grad, golden[f"grad_{name}"], 5e-4 if name in ("g", "beta") else 2e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_golden_from_raw_inputs_through_norm_and_gate(implementation):
    golden = np.load(FIXTURES / "kda_naive_g_gate_softplus.npz")
    names = ("q", "k", "v", "g_raw", "beta_raw", "A_log", "dt_bias", "initial_state")

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=range(8), has_aux=True)
    def loss(q, k, v, g_raw, beta_raw, A_log, dt_bias, state):
        z = g_raw + dt_bias.reshape(g_raw.shape[-2:])
        arrays = (l2norm(q), l2norm(k), v, softplus_gate(z, A_log), jax.nn.sigmoid(beta_raw))
        o, final = run((*arrays, state), implementation=implementation)
        return jnp.sum(o * golden["w"]) + jnp.sum(final * golden["u"]), (o, final)

    (_, out), grads = loss(*(jnp.asarray(golden[name]) for name in names))
    close(out, (golden["o"], golden["final_state"]), 1e-4)
    for name, grad in zip(names, grads, strict=True):
        close(grad, golden[f"grad_{name}"], 5e-4 if name in ("g_raw", "beta_raw") else 2e-4)


def test_against_finite_differences_in_float64():
    arrays, cotangents = draw("gva", length=21)
    segment_ids = jnp.asarray([[1] * 9 + [0] + [2] * 11])
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(np.asarray(a), jnp.float64) for a in arrays)
        cotangents = tuple(jnp.asarray(np.asarray(c), jnp.float64) for c in cotangents)

        @jax.jit
        def loss(arrays):
            o, state = run(arrays, segment_ids, chunk_size=16, implementation="xla")
            return jnp.sum(o * cotangents[0]) + jnp.sum(state * cotangents[1])

        grads = jax.jit(jax.grad(loss))(arrays)
        rng = np.random.default_rng(3)
        for position, name in enumerate(INPUTS):
            direction = jnp.asarray(rng.normal(size=arrays[position].shape))
            moved = [
                loss(
                    (*arrays[:position], arrays[position] + h * direction, *arrays[position + 1 :])
                )
                for h in (1e-5, -1e-5)
            ]
            slope = (moved[0] - moved[1]) / 2e-5
            np.testing.assert_allclose(
                jnp.sum(grads[position] * direction), slope, rtol=1e-6, err_msg=name
            )


# Chunks equal the recurrence -----------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 100, 130])
def test_chunks_equal_recurrence(length):
    """Values for every length and chunk; gradients where a chunk is short, cut or crossed."""
    arrays, cotangents = draw("gva", length=length)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    for chunk_size in (16, 32, 64) if length > 16 else (16,):
        options = {"implementation": "xla", "chunk_size": chunk_size}
        if chunk_size == 16 or length == 130:
            close(value_and_grads(arrays, cotangents, **options), want, 1e-5)
        else:
            close(jax.jit(lambda a, options=options: run(a, **options))(arrays), want[0], 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_decays_are_finite_and_right(dtype):
    # One row a decay, so that each gate is compiled for once.
    rows = [draw(length=70, decay=decay) for decay in ("strong", "bounded", "none")]
    (q, k, v, *rest), cotangents = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
    arrays = (q.astype(dtype), k.astype(dtype), v.astype(dtype), *rest)
    want = value_and_grads(arrays, cotangents, implementation="reference")
    for chunk_size in (16, 64):
        got = value_and_grads(arrays, cotangents, implementation="xla", chunk_size=chunk_size)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(got))
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert g.dtype == w.dtype
            assert relative_rms(g, w) < (1e-5 if dtype == jnp.float32 else 5e-3)


def test_without_writes_the_state_only_decays():
    (q, k, v, g, beta, state), _ = draw("gva", length=40)
    o, final = jax.jit(run)((q, k, v, g, jnp.zeros_like(beta), state))
    decay = jnp.exp(jnp.cumsum(g, axis=1))
    close(final, decay[:, -1][..., None] * state, 1e-5)
    read = jnp.repeat(q, 2, axis=2) * decay * q.shape[-1] ** -0.5
    close(o, jnp.einsum("bthk,bhkv->bthv", read, state), 1e-5)


def test_without_decay_and_with_orthonormal_keys_the_state_is_a_table():
    key_dim = SHAPES["tiny"].key_dim
    (_, _, v, g, _, _), _ = draw(length=key_dim, decay="none")
    k = jnp.broadcast_to(jnp.eye(key_dim)[None, :, None], (1, key_dim, 2, key_dim))
    _, state = jax.jit(kda)(k, k, v, g, jnp.ones(v.shape[:3]))
    close(state, jnp.moveaxis(v, 1, 2), 1e-5)


def test_scale_multiplies_the_output_only():
    arrays, _ = draw(length=20)
    (one, state), (three, same) = (
        jax.jit(lambda a, s=s: run(a, scale=s, chunk_size=16))(arrays) for s in (1.0, 3.0)
    )
    close(three, 3.0 * one, 1e-5)
    close(same, state, 0)


# Packed rows ---------------------------------------------------------------------------------

ROWS = {
    "mid-chunk": [(1, 21), (2, 49)],
    "at chunk edges": [(1, 16), (2, 32), (3, 22)],
    "many in one chunk": [(1, 3), (2, 1), (3, 5), (1, 2), (2, 40), (3, 19)],
    "left padding": [(0, 19), (4, 30), (2, 21)],
    "right padding": [(4, 30), (2, 21), (0, 19)],
    "padding between": [(1, 11), (0, 20), (2, 9), (0, 3), (5, 27)],
    "padding inside": [(1, 11), (0, 20), (1, 39)],
    "only padding": [(0, 70)],
}


def expand(row):
    return np.concatenate([np.full(count, number) for number, count in row])


def test_packed_rows_of_one_chunk_and_a_bit_equal_recurrence():
    segment_ids = jnp.asarray(np.stack([expand(row) for row in ROWS.values()]))
    arrays, cotangents = draw("gva", batch=len(ROWS), length=70)
    want = value_and_grads(arrays, cotangents, segment_ids, implementation="reference")
    got = value_and_grads(arrays, cotangents, segment_ids, implementation="xla", chunk_size=64)
    close(got, want, 1e-5)


def test_long_rows_run_in_blocks(monkeypatch):
    """Two chunks a block here: segments and padding cross blocks, and the last block is padded."""
    monkeypatch.setattr(kda_xla_module, "_BLOCK_CHUNKS", 2)
    rows = [*ROWS.values(), [(1, 69), (2, 1)]]
    segment_ids = jnp.asarray(np.stack([expand(row) for row in rows]))
    arrays, cotangents = draw("gva", batch=len(rows), length=70)
    want = value_and_grads(arrays, cotangents, segment_ids, implementation="reference")
    got = value_and_grads(arrays, cotangents, segment_ids, implementation="xla", chunk_size=16)
    close(got, want, 1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_packed_equals_each_segment_alone(name):
    """What the oracle makes of segment_ids, against one run a segment."""
    row = expand(ROWS[name])
    arrays, _ = draw(length=70)
    *tokens, state = arrays
    o, final = run(arrays, jnp.asarray(row[None]), implementation="reference")
    np.testing.assert_array_equal(o[:, row == 0], 0)
    real = np.flatnonzero(row)
    cuts = np.flatnonzero(np.diff(row[real])) + 1
    for where in np.split(real, cuts) if len(real) else []:
        alone, state = kda(
            *(x[:, where] for x in tokens), initial_state=state, implementation="reference"
        )
        close(o[:, where], alone, 1e-5)
        last, state = state, jnp.zeros_like(state)
    close(final, last if len(real) else state, 1e-5)


def test_gradients_do_not_cross_segments_or_reach_padding():
    arrays, (w, u) = draw(length=70)
    row = expand(ROWS["padding between"])
    only_last = (w * jnp.asarray(row == 5)[None, :, None, None], u)
    _, grads = value_and_grads(arrays, only_last, jnp.asarray(row[None]), implementation="xla")
    for name, grad in zip(INPUTS[:-1], grads[:-1], strict=True):
        if name != "g":
            np.testing.assert_array_equal(np.asarray(grad)[:, row != 5], 0, err_msg=name)
    # dg of earlier tokens is a sum of terms that cancel: zero up to rounding.
    np.testing.assert_allclose(np.asarray(grads[3])[:, row != 5], 0, atol=1e-5)
    np.testing.assert_array_equal(grads[3][:, row == 0], 0)
    np.testing.assert_array_equal(grads[-1], 0)


def test_nan_in_padding_is_harmless():
    arrays, cotangents = draw(length=20)
    row = jnp.asarray([[0] * 5 + [1] * 10 + [0] * 5])
    dirty = tuple(
        jnp.where((row == 0).reshape(1, 20, *[1] * (x.ndim - 2)), jnp.nan, x) for x in arrays[:-1]
    )
    got = value_and_grads((*dirty, arrays[-1]), cotangents, row, chunk_size=16)
    want = value_and_grads(arrays, cotangents, row, chunk_size=16)
    close(got, want, 0)


# States and decoding -------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(64,), (1, 99), (30, 3, 33), (99,)])
def test_any_split_of_a_prefill_gives_the_same(cuts):
    arrays, _ = draw("gva", length=100)
    want = jax.jit(functools.partial(run, implementation="reference"))(arrays)
    *tokens, state = arrays
    parts = []
    for piece in np.split(np.arange(100), np.cumsum(cuts)):
        if len(piece):
            part = (*(x[:, piece] for x in tokens), state)
            o, state = jax.jit(functools.partial(run, chunk_size=16))(part)
            parts.append(o)
    close((jnp.concatenate(parts, axis=1), state), want, 1e-5)


def test_steps_equal_scan():
    arrays, _ = draw("gva", batch=2, length=9)
    want = run(arrays, implementation="reference")
    *tokens, state = arrays
    by_step, by_call, through = [], [], state
    for t in range(9):
        o, state = kda_step(*(x[:, t] for x in tokens), state)
        by_step.append(o)
        o, through = kda(*(x[:, t : t + 1] for x in tokens), initial_state=through)
        by_call.append(o[:, 0])
    close((jnp.stack(by_step, 1), state), want, 1e-6)
    close((jnp.stack(by_call, 1), through), want, 1e-6)


def test_one_padding_token_leaves_the_state():
    arrays, _ = draw(batch=2, length=1)
    o, state = run(arrays, jnp.asarray([[0], [1]]))
    np.testing.assert_array_equal(state[0], arrays[-1][0])
    np.testing.assert_array_equal(o[0], 0)
    close((o[1], state[1]), tuple(x[1] for x in run(arrays)), 0)


def test_no_initial_state_means_zeros():
    (*tokens, state), _ = draw(length=5)
    want = kda(*tokens, initial_state=jnp.zeros_like(state), implementation="reference")
    close(kda(*tokens, implementation="reference"), want, 0)


# Transforms ----------------------------------------------------------------------------------


AXES = ("data", "tensor", "one")
SPECS = {
    "tokens": jax.P("data", None, ("tensor", "one"), None),
    "beta": jax.P("data", None, ("tensor", "one")),
    "state": jax.P("data", ("tensor", "one"), None, None),
    "rows": jax.P("data", None),
}
IN_SPECS = (*(SPECS["tokens"],) * 4, SPECS["beta"], SPECS["state"])


def test_eight_devices_equal_one_where_axes_are_explicit():
    mesh = jax.make_mesh((4, 2, 1), AXES)
    segment_ids = jnp.asarray(np.stack([expand([(1, 5), (2, 9), (0, 6)])] * 4))
    arrays, cotangents = draw(batch=4, length=20)
    want = value_and_grads(arrays, cotangents, segment_ids, implementation="xla", chunk_size=16)

    def local(*args):
        *arrays, segment_ids = args
        return run(arrays, segment_ids, chunk_size=16, implementation="xla")

    @jax.jit
    def both(arrays, cotangents, segment_ids):
        out, pullback = jax.vjp(lambda *a: local(*a, segment_ids), *arrays)
        return out, pullback(cotangents)

    def put(x, spec):
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        placed = tuple(put(x, s) for x, s in zip(arrays, IN_SPECS, strict=True))
        ways = (SPECS["tokens"], SPECS["state"])
        cotangents = tuple(put(x, s) for x, s in zip(cotangents, ways, strict=True))
        got = both(placed, cotangents, put(segment_ids, SPECS["rows"]))
    close(got, want, 1e-6)


def test_memory_is_linear_in_length():
    """Temporaries of forward + backward grow by the same for every token, and by far less than a
    C x C x K array per chunk."""
    (*tokens, state), _ = draw("kimi_8m", length=1)
    sizes = []
    for length in (4096, 8192, 16384):
        shapes = [
            jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for x in (*tokens, tokens[2])
        ]

        def step(q, k, v, g, beta, do):
            _, pullback = jax.vjp(
                lambda *a: run((*a, state), implementation="xla")[0], q, k, v, g, beta
            )
            return pullback(do)

        analysis = jax.jit(step).lower(*shapes).compile().memory_analysis()
        sizes.append(analysis.temp_size_in_bytes)
    first, second = np.diff(sizes)
    assert first > 0 and abs(second / first - 2) < 0.1, sizes
    shape, chunk = SHAPES["kimi_8m"], 64
    pairwise = 4 * shape.num_value_heads * chunk * shape.key_dim
    assert sizes[-1] / 16384 < 0.3 * pairwise, (sizes, pairwise)


# Gates and errors ----------------------------------------------------------------------------


def test_gates_follow_their_formulas():
    z = np.linspace(-30, 30, 24).reshape(1, 3, 2, 4)
    rate = np.asarray([0.5, 16.0])
    A_log = jnp.asarray(np.log(rate), jnp.float32)
    softplus = softplus_gate(jnp.asarray(z, jnp.bfloat16), A_log)
    assert softplus.dtype == jnp.float32
    exact = np.asarray(jnp.asarray(z, jnp.bfloat16), np.float64)
    close(softplus, -rate[:, None] * np.logaddexp(exact, 0), 1e-4)
    bounded = bounded_gate(jnp.asarray(z, jnp.float32), A_log)
    close(bounded, -5.0 / (1 + np.exp(-rate[:, None] * z)), 1e-5)
    assert float(bounded.min()) >= -5.0
    with pytest.raises(InputError, match="lower_bound=-6"):
        bounded_gate(jnp.asarray(z), A_log, lower_bound=-6.0)


def test_l2norm_has_eps_inside_the_root():
    x = jnp.asarray([[3e-3, 4e-3], [0.0, 0.0]])
    close(l2norm(x), np.asarray([[3e-3, 4e-3], [0, 0]]) / np.sqrt(26e-6), 1e-6)


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_names_the_argument():
    (q, k, v, g, beta, state), _ = draw("gva", length=8)
    for implementation in ("mosaic", "fast"):
        with pytest.raises(InputError, match=f"{implementation}.*reference, tokamax, xla"):
            kda(q, k, v, g, beta, implementation=implementation)
    with pytest.raises(InputError, match="chunk_size=48"):
        kda(q, k, v, g, beta, chunk_size=48)
    with pytest.raises(InputError, match="3 heads"):
        kda(q, k, v[:, :, :3], g, beta)
    with pytest.raises(InputError, match="beta has shape"):
        kda(q, k, v, g, beta[..., None])
    with pytest.raises(InputError, match="initial_state has shape"):
        kda(q, k, v, g, beta, initial_state=jnp.swapaxes(state, -1, -2))
    with pytest.raises(InputError, match="segment_ids has dtype float32"):
        kda(q, k, v, g, beta, segment_ids=jnp.ones((1, 8)))


def test_a_platform_with_its_own_backend_is_picked_when_lowering(monkeypatch):
    """A new backend is a line in two tables; here the oracle plays a TPU kernel."""
    monkeypatch.setitem(kda_module._BY_PLATFORM, "tpu", "reference")
    arrays, cotangents = draw(length=20)
    want = value_and_grads(arrays, cotangents, implementation="xla")
    close(value_and_grads(arrays, cotangents), want, 1e-5)
    # Only the token scan moves time to the front: T (padded to 32), B, H, K.
    assert "tensor<32x1x2x16xf32>" in lowered(run, arrays, platform="tpu")
    assert "tensor<32x1x2x16xf32>" not in lowered(run, arrays, platform="cpu")
