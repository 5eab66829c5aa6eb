"""Decoding over latents: every implementation against the oracle, kernels interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import interpreted, lowered

import jaxalope.layers.ops.latent_decode as module
from jaxalope.errors import InputError
from jaxalope.layers.latent_attention import write_rows
from jaxalope.layers.ops.latent_decode import latent_decode, pallas_gpu, pallas_tpu, xla
from jaxalope.layers.ops.latent_decode.shapes import SHAPES
from jaxalope.sharding import AxisRules, kernel_map, use_rules

KERNELS = {
    "pallas_tpu": pallas_tpu.latent_decode_pallas_tpu,
    "pallas_gpu": pallas_gpu.latent_decode_pallas_gpu,
}


@pytest.fixture(params=["xla", *KERNELS])
def implementation(request, monkeypatch):
    """Each one but the oracle, in small blocks and short spans; kernels run by XLA on this host."""
    monkeypatch.setattr(xla, "_BLOCK", 128)
    monkeypatch.setattr(pallas_tpu, "_MAX_BLOCK", 128)
    monkeypatch.setattr(pallas_gpu, "_MIN_SPAN", 64)
    if request.param in KERNELS:
        run = functools.partial(KERNELS[request.param], interpret=interpreted(request.param))
        monkeypatch.setitem(module._IMPLEMENTATIONS, request.param, run)
    return request.param


def draw(batch, length, heads, capacity, width, last=(0,)):
    """q, latents and positions; rows end at ``last`` in turn, and hold no numbers after that."""
    rng = np.random.default_rng(capacity)
    q = rng.normal(size=(batch, length, heads, width))
    latent = rng.normal(size=(batch, capacity, width))
    end = np.resize(np.asarray(last), batch)
    positions = end[:, None] - np.arange(length)[::-1]
    for row, stop in enumerate(end):
        rest = latent[row, max(stop + 1, 0) :]
        rest[0::2], rest[1::2] = np.nan, np.inf
    floats = (jnp.asarray(x, jnp.float32) for x in (q, latent))
    return (*floats, jnp.asarray(positions, jnp.int32))


def run(q, latent, positions, value_dim, implementation="reference"):
    return latent_decode(
        q,
        latent,
        positions=positions,
        value_dim=value_dim,
        scale=0.3,
        implementation=implementation,
    )


# Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, value_dim, last",
    [
        ((1, 1, 1, 1, 5), 5, (0,)),
        ((3, 1, 8, 37, 14), 10, (0, 36, 17)),
        ((3, 3, 5, 300, 28), 20, (299, -1, 130)),
        ((2, 3, 33, 400, 24), 16, (127, 128)),
        ((1, 1, 32, 515, 24), 16, (514,)),
        ((2, 1, 4, 260, 128), 128, (259, 1000)),
    ],
)
def test_equals_the_oracle(implementation, shape, value_dim, last):
    """Rows that end at their first slot, at a block's edge, at the last slot and past it.

    The last case has as many columns as lanes: the TPU kernel takes its blocks the other way.
    """
    arrays = draw(*shape, last=last)
    want = run(*arrays, value_dim)
    assert np.isfinite(want).all()
    got = run(*arrays, value_dim, implementation)
    assert got.shape == (*shape[:3], value_dim) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=3e-6)


@pytest.mark.parametrize("scores, block", [(2**24, 128), (3 * 5 * 3 * 130, 128), (2**24, 256)])
def test_blocks_of_the_xla_form_on_a_gpu(monkeypatch, scores, block):
    """Larger ones, and fewer, to the same result; what is lowered for CUDA holds them."""
    monkeypatch.setattr(xla, "_BLOCK", 128)
    monkeypatch.setattr(xla, "_GPU_TURNS", 700 // block)
    monkeypatch.setattr(xla, "_GPU_SCORES", scores)
    arrays = draw(3, 3, 5, 700, 28, last=(699, -1, 300))
    assert xla._gpu_block(*arrays[:2]) == block
    counts = arrays[2] + 1
    got = xla._by_blocks(block, arrays[0], arrays[1], counts, value_dim=20, scale=0.3)
    np.testing.assert_allclose(got, run(*arrays, 20), atol=3e-6)
    text = lowered(lambda *a: run(*a, 20, "xla"), *arrays, platform="cuda")
    assert f"tensor<3x{block}x28xf32>" in text


def test_the_oracle_is_attention_over_what_a_query_sees():
    q, latent, positions = draw(2, 2, 3, 9, 6, last=(8, 3))
    out = run(q, latent, positions, 4)
    for row, token in np.ndindex(2, 2):
        seen = latent[row, : positions[row, token] + 1]
        weights = jax.nn.softmax(0.3 * q[row, token] @ seen.T, axis=-1)
        np.testing.assert_allclose(out[row, token], weights @ seen[:, :4], atol=1e-6)


def test_queries_that_see_nothing_return_zeros(implementation):
    q, latent, _ = draw(2, 2, 3, 140, 6, last=(139,))
    out = run(q, latent, jnp.asarray([[-1, -7], [5, -1]]), 4, implementation)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(out[1, 1], 0)
    assert np.abs(out[1, 0]).min() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bfloat16_latents(implementation, dtype):
    """Beside queries in bfloat16, and in float32, which the products then run in."""
    q, latent, positions = draw(2, 1, 8, 300, 24, last=(299, 140))
    q, latent = q.astype(dtype), latent.astype(jnp.bfloat16)
    want = run(q.astype(jnp.float32), latent.astype(jnp.float32), positions, 16)
    got = run(q, latent, positions, 16, implementation)
    assert got.dtype == q.dtype
    error = jnp.sqrt(jnp.mean((got.astype(jnp.float32) - want) ** 2) / jnp.mean(want**2))
    assert error < (5e-3 if dtype == "bfloat16" else 1e-6)


# Transforms ----------------------------------------------------------------------------------


def test_vmap_over_rows_and_over_queries_of_one_cache(implementation):
    q, latent, positions = draw(6, 1, 3, 140, 6, last=(139, 0, 70))
    want = run(q, latent, positions, 4)
    call = functools.partial(run, value_dim=4, implementation=implementation)
    rows = [x.reshape(2, 3, *x.shape[1:]) for x in (q, latent, positions)]
    np.testing.assert_allclose(jax.vmap(call)(*rows).reshape(want.shape), want, atol=3e-6)
    q, positions = q.reshape(2, 3, 1, 3, 6), jnp.minimum(rows[2], rows[2][:1])
    shared = jax.vmap(call, in_axes=(0, None, 0))(q, latent[:3], positions)
    for some in range(2):
        want = run(q[some], latent[:3], positions[some], 4)
        np.testing.assert_allclose(shared[some], want, atol=3e-6)


def test_inside_loops(implementation):
    """Growing by a token a step in a while loop, over two layers in a scan."""
    q, latent, _ = draw(2, 1, 3, 140, 6, last=(139,))
    caches = jnp.stack([latent, latent[:, ::-1]])

    def decode(implementation):
        def layer(state, latent):
            q, positions = state
            o = run(q, latent, positions, 6, implementation)
            return (q + o, positions), None

        def step(state):
            q, positions = jax.lax.scan(layer, state, caches)[0]
            return q, positions + 1

        start = (q, jnp.asarray([[125], [3]]))
        return jax.lax.while_loop(lambda state: state[1][0, 0] < 130, step, start)[0]

    got = jax.jit(decode, static_argnums=0)(implementation)
    np.testing.assert_allclose(got, decode("reference"), rtol=1e-5)


def test_gradients_are_those_of_the_oracle(implementation):
    q, latent, positions = draw(2, 2, 3, 140, 6, last=(139, 20))
    latent = jnp.nan_to_num(latent, posinf=0)

    def loss(implementation, q, latent):
        return jnp.sum(jnp.sin(run(q, latent, positions, 4, implementation)))

    want = jax.grad(loss, argnums=(1, 2))("reference", q, latent)
    got = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)(implementation, q, latent)
    assert np.abs(want[1]).max() > 0.01
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_eight_devices_equal_one(implementation):
    mesh = jax.make_mesh((4, 2, 1), ("data", "tensor", "expert"))
    arrays = draw(4, 1, 6, 140, 6, last=(139, 0, 70, 128))
    own, row = ("batch", None, "heads", None), ("batch", None)

    @jax.jit
    def split(*arrays):
        call = functools.partial(run, value_dim=4, implementation=implementation)
        return kernel_map(call, (own, (*row, None), row), own)(*arrays)

    with jax.set_mesh(mesh), use_rules(AxisRules(batch="data", heads=("tensor", "expert"))):
        got = split(*arrays)
    np.testing.assert_allclose(got, run(*arrays, 4), atol=3e-6)


# Bad input -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_named():
    q, latent, positions = draw(2, 1, 3, 9, 6, last=(8,))
    for change, match in (
        ({"implementation": "triton"}, "implementation='triton' is not one of pallas_gpu, "),
        ({"value_dim": 7}, r"value_dim=7 must be in 1\.\.6"),
        ({"value_dim": 0}, "value_dim=0"),
        ({"latent": latent[..., :5]}, r"latent \(2, 9, 5\) must be"),
        ({"latent": latent[:, :0]}, "at least one slot"),
        ({"q": q[:, :0]}, r"q \(2, 0, 3, 6\) must be"),
        ({"positions": positions[0]}, r"positions int32\[1\] must be integers"),
        ({"positions": positions * 1.0}, r"positions float32\[2, 1\]"),
    ):
        call = {"q": q, "latent": latent, "positions": positions, "value_dim": 4, "scale": 1.0}
        with pytest.raises(InputError, match=match):
            latent_decode(**call | change)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_kernels_do_not_take_is_named(kernel):
    q, latent, positions = draw(1, 1, 3, 9, 6, last=(8,))
    with pytest.raises(InputError, match=f'latent has dtype float16; implementation="{kernel}"'):
        run(q, latent.astype(jnp.float16), positions, 4, kernel)
    if kernel == "pallas_tpu":
        q = jnp.zeros((1, 1025, 1, 6))
        with pytest.raises(InputError, match="1025 queries a row"):
            run(q, latent, jnp.zeros((1, 1025), jnp.int32), 4, kernel)
    else:
        with pytest.raises(InputError, match="more than 512 columns"):
            run(jnp.zeros((1, 1, 3, 600)), jnp.zeros((1, 9, 600)), positions, 513, kernel)


# Where they run ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_platform_is_named_when_lowering(kernel):
    arrays = draw(1, 1, 3, 9, 6, last=(8,))
    for call in (run, jax.jit(run, static_argnums=(3, 4))):
        with pytest.raises(InputError, match=f'"{kernel}" is being lowered for cpu: use impl'):
            call(*arrays, 4, kernel)


def of_48b(batch, length, capacity, sharding=None, dtype="bfloat16"):
    """Queries, latents and positions of a layer of Kimi-Linear-48B, as shapes."""
    shape = SHAPES["kimi_48b"]
    return tuple(
        jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
        for dims, dtype in (
            ((batch, length, shape.num_heads, shape.width), dtype),
            ((batch, capacity, shape.width), dtype),
            ((batch, length), "int32"),
        )
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_cuda_without_a_gpu(dtype):
    """As one call of Triton, mapped over rows or not."""
    call = functools.partial(run, value_dim=512, implementation="pallas_gpu")
    mapped = [
        jax.ShapeDtypeStruct((2, 2, *x.shape), x.dtype) for x in of_48b(3, 2, 5000, dtype=dtype)
    ]
    for function, arrays in (
        (call, of_48b(1, 1, 1 << 20, dtype=dtype)),
        (jax.vmap(jax.vmap(call)), mapped),
    ):
        assert lowered(function, *arrays, platform="cuda").count("xla.gpu.triton") == 1


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_decoding_compiles_ahead_of_time(topology, absent_tpu):
    place = absent_tpu(topology)

    def decode(q, latent, positions):
        """A loop that writes a token to every row's cache, and reads it."""

        def step(_, state):
            q, latent, positions = state
            latent = write_rows(latent, q[:, :, 0], positions[:, 0], one_by_one=True)
            o = run(q, latent, positions, 512, "pallas_tpu")
            return q.at[..., :512].set(o), latent, positions + 1

        return jax.lax.fori_loop(0, 8, step, (q, latent, positions))

    arrays = of_48b(3, 1, 1 << 14, place)
    compiled = jax.jit(decode, donate_argnums=1).lower(*arrays).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    # The cache lies as the kernel reads it: nowhere is there a second one.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * arrays[1].size / 4


@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("length, capacity, dtype", [(32, 300, "bfloat16"), (3, 3000, "float32")])
def test_many_queries_and_float32_compile_ahead_of_time(
    topology, length, capacity, dtype, absent_tpu
):
    """What takes most VMEM: 1024 queries a row, and float32."""
    arrays = of_48b(2, length, capacity, absent_tpu(topology), dtype)
    call = functools.partial(run, value_dim=512, implementation="pallas_tpu")
    jax.jit(call).lower(*arrays).compile()
