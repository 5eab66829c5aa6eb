"""`jax_default_matmul_precision` is for others: kernels on 16-bit inputs are the same under it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
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
    (kda_problem, "pallas_gpu"),
    (latent_problem, "pallas_gpu"),
    (experts_problem, "pallas_gpu"),
    (kda_problem, "pallas_tpu"),
    (latent_problem, "pallas_tpu"),
    (experts_problem, "xla"),
]


@pytest.mark.parametrize("problem, name", KERNELS)
def test_programs_are_the_same(problem, name):
    function, arrays = problem(name)
    found = set()
    for asked in (None, "tensorfloat32", "highest"):
        with jax.default_matmul_precision(asked):
            program = str(jax.make_jaxpr(lambda *a: function(*a))(*arrays))
        found.add(re.sub("0x[0-9a-f]+", "", program))
    assert "dot" in program and len(found) == 1


@pytest.mark.parametrize("problem, name", KERNELS[3:])
def test_it_compiles_for_a_tpu(problem, name, absent_tpu):
    """Mosaic refuses products of 16-bit factors that ask for more."""
    function, arrays = problem(name)
    place = absent_tpu("v5e:2x2")
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays]
    with jax.default_matmul_precision("highest"):
        jax.jit(function).lower(*arrays).compile()
