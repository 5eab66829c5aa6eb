"""`jax_default_matmul_precision` is for others: kernels on 16-bit inputs are the same under it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from chips import lowered
from kda_cases import draw_heads, low_precision, run

from jaxalope.layers.ops.grouped_matmul import grouped_swiglu
from jaxalope.layers.ops.latent_decode import latent_decode


def both_passes(function):
    def both(*arrays):
        out, pullback = jax.vjp(function, *arrays)
        return pullback(out)

    return both


def shapes(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def kda_problem(implementation):
    arrays, _ = draw_heads(100, heads=2, value_heads=2, key=32, value=32)
    call = functools.partial(run, implementation=implementation)
    return both_passes(lambda *a: call(a)), low_precision(arrays)


def latent_problem(implementation):
    call = functools.partial(latent_decode, value_dim=128, scale=0.1, implementation=implementation)
    arrays = shapes(2, 3, 16, 192), shapes(2, 512, 192), shapes(2, 3, dtype=jnp.int32)
    return lambda q, latent, positions: call(q, latent, positions=positions), arrays


def experts_problem(implementation):
    up, down = shapes(4, 128, 256), shapes(4, 256, 128)
    call = functools.partial(grouped_swiglu, implementation=implementation)

    def both(sizes, *arrays):
        return both_passes(lambda *a: call(*a, sizes))(*arrays)

    return both, (shapes(4, dtype=jnp.int32), shapes(256, 128), up, up, down)


KERNELS = [
    ("cuda", kda_problem, "pallas_gpu"),
    ("cuda", latent_problem, "pallas_gpu"),
    ("cuda", experts_problem, "pallas_gpu"),
    ("tpu", kda_problem, "pallas_tpu"),
    ("tpu", latent_problem, "pallas_tpu"),
    ("tpu", experts_problem, "xla"),
]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("platform, problem, implementation", KERNELS)
def test_what_is_lowered_is_the_same(platform, problem, implementation):
    function, arrays = problem(implementation)
    found = {}
    for asked in (None, "tensorfloat32", "highest"):
        with jax.default_matmul_precision(asked):
            found[asked] = lowered(function, *arrays, platform=platform)
    assert found["tensorfloat32"] == found[None] == found["highest"]


@pytest.mark.parametrize("problem, implementation", [case[1:] for case in KERNELS[3:]])
def test_it_compiles_for_a_tpu(problem, implementation, absent_tpu):
    """Mosaic refuses products of 16-bit factors that ask for more."""
    function, arrays = problem(implementation)
    place = absent_tpu("v5e:2x2")
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays]
    with jax.default_matmul_precision("highest"):
        jax.jit(function).lower(*arrays).compile()
