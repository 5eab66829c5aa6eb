"""Kernels through XLA's own compiler for GPUs that are not there: the code that a GPU would run.

Lowering (in the tests of each operator) stops before Triton's compiler and ptxas, where sizes of
tiles, types of loops and shared memory are judged.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from kda_cases import draw_heads, low_precision, run

from jaxalope.layers.ops.grouped_matmul import grouped_swiglu
from jaxalope.layers.ops.grouped_matmul.shapes import SHAPES as EXPERTS
from jaxalope.layers.ops.kda import kda_step
from jaxalope.layers.ops.kda.shapes import SHAPES as HEADS
from jaxalope.layers.ops.latent_decode import latent_decode
from jaxalope.layers.ops.latent_decode.shapes import SHAPES as LATENTS

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]
TRITON = "__gpu$xla.gpu.triton"
KINDS = ["a100", "h200", "b200"]


@pytest.fixture
def compiled(absent_gpus):
    """``compiled(kind, function, *arrays)``: the program for one GPU of that kind."""

    def compile_for(kind, function, *arrays):
        device = absent_gpus(kind)[0]
        place = jax.sharding.SingleDeviceSharding(device)
        arrays = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays
        )
        auto = (jax.sharding.AxisType.Auto,)
        with jax.set_mesh(jax.make_mesh((1,), ("device",), auto, devices=[device])):
            return jax.jit(function).lower(*arrays).compile()

    return compile_for


def both_passes(function):
    """The function's results, and gradients that need all of them."""

    def both(*arrays):
        out, pullback = jax.vjp(function, *arrays)
        return out, pullback(out)

    return both


def kernels(program) -> int:
    return program.as_text().count(f'custom_call_target="{TRITON}"')


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_kda_at_published_widths(compiled, kind, chunk_size):
    s = HEADS["kimi_48b"]
    arrays, _ = draw_heads(256, heads=4, value_heads=4, key=s.key_dim, value=s.value_dim)
    call = functools.partial(run, chunk_size=chunk_size, implementation="pallas_gpu")
    program = compiled(kind, both_passes(lambda *a: call(a)), *low_precision(arrays))
    # score, solve, advance; decay, retreat, pairs, transpose.
    assert kernels(program) == 7


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kda_of_the_widest_heads(compiled, dtype):
    """What they take of shared memory."""
    arrays, _ = draw_heads(128, key=256, value=256)
    arrays = low_precision(arrays) if dtype == jnp.bfloat16 else arrays
    call = functools.partial(run, chunk_size=64, implementation="pallas_gpu")
    assert kernels(compiled("h200", both_passes(lambda *a: call(a)), *arrays)) == 7


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kda_of_odd_sizes(compiled, dtype):
    """Grouped heads, packed rows, widths that are no powers of two, under vmap."""
    arrays, _ = draw_heads(100, heads=2, value_heads=4, key=24, value=40)
    arrays = low_precision(arrays) if dtype == jnp.bfloat16 else arrays
    segment_ids = jnp.ones((1, 100), jnp.int32)
    both = jax.vmap(
        both_passes(lambda *a: run(a, segment_ids, chunk_size=32, implementation="pallas_gpu"))
    )
    program = compiled("h200", both, *(jnp.stack([x, x]) for x in arrays))
    assert kernels(program) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_kda_of_one_token(compiled, kind):
    s = HEADS["kimi_48b"]
    arrays, _ = draw_heads(
        1, batch=2, heads=s.num_heads, value_heads=s.num_value_heads, key=s.key_dim, value=128
    )
    *tokens, state = low_precision(arrays)
    step = functools.partial(kda_step, implementation="pallas_gpu")
    program = compiled(kind, step, *(x[:, 0] for x in tokens), state)
    assert kernels(program) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens, dtype", [(1, "bfloat16"), (4, "bfloat16"), (1, "float32")])
def test_latent_decode_at_published_widths(compiled, kind, tokens, dtype):
    s = LATENTS["kimi_48b"]
    arrays = (
        jax.ShapeDtypeStruct((2, tokens, s.num_heads, s.width), dtype),
        jax.ShapeDtypeStruct((2, 5000, s.width), dtype),
        jax.ShapeDtypeStruct((2, tokens), "int32"),
    )

    def decode(q, latent, positions):
        return latent_decode(
            q,
            latent,
            positions=positions,
            value_dim=s.value_dim,
            scale=s.width**-0.5,
            implementation="pallas_gpu",
        )

    assert kernels(compiled(kind, decode, *arrays)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens, dtype", [(8192, "bfloat16"), (16, "bfloat16"), (64, "float32")])
def test_experts_by_default_are_kernels(compiled, kind, tokens, dtype):
    """XLA's form would need a copy of the rows for each of 256 experts: 74 GB forward."""
    s = EXPERTS["kimi_48b"]
    x = jax.ShapeDtypeStruct((tokens * s.top_k, s.features), dtype)
    wide = jax.ShapeDtypeStruct((s.num_experts, s.features, s.hidden_features), dtype)
    narrow = jax.ShapeDtypeStruct((s.num_experts, s.hidden_features, s.features), dtype)
    sizes = jax.ShapeDtypeStruct((s.num_experts,), "int32")

    def both(x, gate, up, down, sizes):
        return both_passes(lambda *a: grouped_swiglu(*a, sizes))(x, gate, up, down)

    program = compiled(kind, both, x, wide, wide, narrow, sizes)
    assert kernels(program) == 9
    # Three products of each row, and their gradients, at most.
    rows = x.size * x.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < 8 * rows + 2**24
