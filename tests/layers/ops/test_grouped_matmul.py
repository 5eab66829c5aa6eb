"""Grouped products: every form against the dense oracle, whatever the sizes of the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import lowered, runs

from jaxalope import InputError
from jaxalope.layers.ops import grouped_matmul as operator
from jaxalope.layers.ops import tuning
from jaxalope.layers.ops.grouped_matmul import (
    IMPLEMENTATIONS,
    grouped_matmul,
    grouped_swiglu,
    pallas_gpu,
)
from jaxalope.layers.ops.grouped_matmul.blocked import BLOCK
from jaxalope.layers.ops.grouped_matmul.shapes import SHAPES

D, F = 12, 10
FORMS = [name for name in ("xla", "blocked", "pallas_gpu") if runs(name)]

# Rows, then the size of each group.
SIZES = {
    "balanced": (40, [10, 10, 10, 10]),
    "uneven": (40, [3, 17, 0, 20]),
    "first and last empty": (40, [0, 25, 15, 0]),
    "all in one": (40, [0, 0, 40, 0]),
    "all in the last": (40, [0, 0, 0, 40]),
    "rows past the last group": (40, [4, 9, 1, 6]),
    "no rows at all": (40, [0, 0, 0, 0]),
    "fewer rows than groups": (3, [1, 0, 1, 1]),
    "one row in a group": (3, [0, 1, 0, 0]),
    "one group": (21, [20]),
    "a turn of the loop that would overrun": (4 * BLOCK, [BLOCK + 60, 3, 2, 2 * BLOCK - 1]),
    "several turns": (4 * BLOCK, [5, 3 * BLOCK + 7, 0, 50]),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernels run on any platform here."""
    if jax.default_backend() == "cpu":
        kernels = pallas_gpu.products(interpret=True)
        monkeypatch.setitem(operator._FORMS, "pallas_gpu", kernels)


def problem(num_rows, sizes, dtype=jnp.float32, seed=0):
    """Random rows, gate, up and down weights, the sizes, and a cotangent of the rows' width."""
    keys = jax.random.split(jax.random.key(seed), 5)
    num_groups = len(sizes)
    shapes = [(num_rows, D), (num_groups, D, F), (num_groups, D, F), (num_groups, F, D)]
    arrays = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=False)]
    return *arrays, jnp.asarray(sizes, jnp.int32), jax.random.normal(keys[4], (num_rows, D))


def value_and_gradients(fn, dy, *args):
    y, pull = jax.vjp(fn, *args)
    return y, *pull(dy.astype(y.dtype))


def close(actual, expected, relative):
    for a, b in zip(actual, expected, strict=True):
        b = np.asarray(b, np.float32)
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=relative * scale)


@functools.cache
def matmul_and_gradients(implementation):
    """One jitted function a form, so that cases of one shape share its compilation."""

    def run(x, w, sizes, dy):
        return value_and_gradients(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), dy, x, w
        )

    return jax.jit(run)


@functools.cache
def swiglu_and_gradients(implementation):
    def run(x, gate, up, down, sizes, dy):
        return value_and_gradients(
            lambda *a: grouped_swiglu(*a, sizes, implementation=implementation),
            dy, x, gate, up, down,
        )  # fmt: skip

    return jax.jit(run)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("case", SIZES)
def test_matmul_is_the_oracle(case, implementation):
    x, gate, _, _, sizes, _ = problem(*SIZES[case])
    args = (x, gate, sizes, jax.random.normal(jax.random.key(9), (x.shape[0], F)))
    actual = matmul_and_gradients(implementation)(*args)
    close(actual, matmul_and_gradients("reference")(*args), 1e-5)
    past = int(sizes.sum())
    assert not np.any(actual[0][past:]) and not np.any(actual[1][past:])


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("case", SIZES)
def test_swiglu_is_the_oracle(case, implementation):
    args = problem(*SIZES[case])
    actual = swiglu_and_gradients(implementation)(*args)
    close(actual, swiglu_and_gradients("reference")(*args), 1e-5)
    past = int(args[4].sum())
    assert not np.any(actual[0][past:]) and not np.any(actual[1][past:])


def test_default_is_differentiable():
    args = problem(*SIZES["uneven"])
    close(swiglu_and_gradients(None)(*args), swiglu_and_gradients("reference")(*args), 1e-5)


def test_oracle_is_a_loop_over_rows():
    x, gate, _, _, sizes, _ = problem(*SIZES["rows past the last group"])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.zeros((x.shape[0], F), np.float32)
    for row, owner in enumerate(owners):
        expected[row] = np.asarray(x[row]) @ np.asarray(gate[owner])
    actual = grouped_matmul(x, gate, sizes, implementation="reference")
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_bfloat16_accumulates_in_float32(implementation):
    """Each of the three products may round its operands and its result, and nothing in between."""
    args = problem(200, [20, 130, 0, 50], jnp.bfloat16)
    actual = swiglu_and_gradients(implementation)(*args)
    assert {a.dtype for a in actual} == {jnp.dtype("bfloat16")}
    x, gate, up, down, sizes, dy = args
    wide = (a.astype(jnp.float32) for a in (x, gate, up, down))
    for a, b in zip(actual, swiglu_and_gradients("reference")(*wide, sizes, dy), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 8e-3, error


@pytest.mark.parametrize("implementation", [*FORMS, None])
def test_gradients_of_float32_weights_are_not_rounded(implementation):
    """Rows in bfloat16, weights as an optimizer keeps them."""
    x, gate, up, down, sizes, dy = problem(200, [20, 130, 0, 50])
    rows = x.astype(jnp.bfloat16)
    run = swiglu_and_gradients(implementation)
    y, dx, *dw = run(rows, gate, up, down, sizes, dy)
    assert y.dtype == dx.dtype == jnp.bfloat16 and {d.dtype for d in dw} == {jnp.dtype("float32")}
    narrow = [w.astype(jnp.bfloat16) for w in (gate, up, down)]
    rounded = run(rows, *narrow, sizes, dy)
    for a, b in zip((y, dx, *dw), rounded, strict=True):
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), b)
    assert any(np.any(a != b.astype(jnp.float32)) for a, b in zip(dw, rounded[2:], strict=True))
    product = jax.grad(lambda w: jnp.sum(grouped_matmul(rows, w, sizes).astype(jnp.float32)))
    assert product(gate).dtype == jnp.float32


def test_sums_of_many_bfloat16_rows_do_not_stall():
    """A weight gradient over 2,048 equal rows: bfloat16 partial sums would stop at 256."""
    x, w = jnp.ones((2048, 4), jnp.bfloat16), jnp.ones((2, 4, 4), jnp.bfloat16)
    sizes = jnp.asarray([2048, 0], jnp.int32)
    for implementation in FORMS:
        gradient = jax.grad(
            lambda w, i=implementation: (
                grouped_matmul(x, w, sizes, implementation=i).astype(jnp.float32).sum()
            )
        )(w)
        np.testing.assert_array_equal(gradient[0].astype(jnp.float32), 2048.0)


@pytest.mark.parametrize("implementation", FORMS)
def test_non_finite_rows_past_the_groups_stay_out(implementation):
    x, gate, up, down, sizes, dy = problem(*SIZES["rows past the last group"])
    x = x.at[int(sizes.sum()) :].set(jnp.inf)
    results = swiglu_and_gradients(implementation)(x, gate, up, down, sizes, dy)
    assert all(np.isfinite(r).all() for r in results)


def test_default_follows_the_platform_that_is_lowered_for():
    """CPU code must not hold ragged_dot's expansion, code for TPU must hold ragged_dot."""
    x, gate, up, down, sizes, _ = problem(*SIZES["uneven"])
    arrays = x, gate, up, down, sizes
    assert "while" in lowered(grouped_swiglu, *arrays, platform="cpu")
    for_tpu = lowered(grouped_swiglu, *arrays, platform="tpu")
    assert "ragged_dot" in for_tpu and "while" not in for_tpu


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_default_on_a_gpu_is_no_dense_product(monkeypatch):
    monkeypatch.setitem(operator._FORMS, "pallas_gpu", pallas_gpu.products())

    def program(dtype):
        *arrays, _ = problem(*SIZES["uneven"], dtype)
        return lowered(grouped_swiglu, *arrays, platform="cuda")

    assert program(jnp.bfloat16).count("triton") == 3
    assert "while" in program(jnp.float16) and "ragged_dot" not in program(jnp.float16)
    monkeypatch.setattr(pallas_gpu, "plgpu", None)  # as a JAX without the Triton lowering
    assert "while" in program(jnp.bfloat16) and "triton" not in program(jnp.bfloat16)


TILES = {"row_tile": 16, "column_tile": 32, "depth_tile": 16}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tiles_of_the_kernels_change_no_result(dtype):
    """Widths of several tiles, and of one that is not full; groups that end within a tile."""
    shapes = ((150, 80), (5, 80, 72), (5, 80, 72), (5, 72, 80))
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    arrays = [a.astype(dtype).astype(jnp.float32) for a in arrays]
    sizes, dy = jnp.asarray([7, 0, 90, 33, 11], jnp.int32), jax.random.normal(keys[4], (150, 80))
    expected = swiglu_and_gradients("reference")(*arrays, sizes, dy)
    narrow = [a.astype(dtype) for a in arrays]
    for chosen in ({}, TILES):
        with tuning.trying("grouped_matmul", **chosen):
            run = swiglu_and_gradients.__wrapped__("pallas_gpu")
            close(run(*narrow, sizes, dy), expected, 1e-5 if dtype == jnp.float32 else 2e-2)


def test_kernels_say_what_they_take(monkeypatch):
    monkeypatch.setitem(operator._FORMS, "pallas_gpu", pallas_gpu.products())
    x, gate, _, _, sizes, _ = problem(*SIZES["uneven"])
    with pytest.raises(InputError, match=r"grouped_matmul.*pallas_gpu.*lowered for cpu"):
        jax.jit(functools.partial(grouped_matmul, implementation="pallas_gpu"))(x, gate, sizes)
    with pytest.raises(InputError, match="float16"):
        half = (x.astype(jnp.float16), gate.astype(jnp.float16), sizes)
        grouped_matmul(*half, implementation="pallas_gpu")


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_input():
    x, gate, up, down, sizes, _ = problem(*SIZES["uneven"])
    with pytest.raises(InputError, match="implementation='mosaic'"):
        grouped_matmul(x, gate, sizes, implementation="mosaic")
    with pytest.raises(InputError, match=r"w \(4, 10, 12\)"):
        grouped_matmul(x, down, sizes)
    with pytest.raises(InputError, match="group_sizes"):
        grouped_matmul(x, gate, sizes[:3])
    with pytest.raises(InputError, match="down"):
        grouped_swiglu(x, gate, up, gate, sizes)
    assert set(IMPLEMENTATIONS) == {"reference", "xla", "blocked", "pallas_gpu", "tokamax"}


def test_published_widths():
    """The 48B model's experts, traced at their own widths."""
    s = SHAPES["kimi_48b"]
    wide = jax.ShapeDtypeStruct((s.num_experts, s.features, s.hidden_features), jnp.bfloat16)
    narrow = jax.ShapeDtypeStruct((s.num_experts, s.hidden_features, s.features), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4096 * s.top_k, s.features), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((s.num_experts,), jnp.int32)
    y = jax.eval_shape(grouped_swiglu, x, wide, wide, narrow, sizes)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
