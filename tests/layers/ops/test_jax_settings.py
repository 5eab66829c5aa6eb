"""Settings of JAX that are for others: kernels on 16-bit inputs are the same under them."""

import functools
import re

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


def kernels_in(jaxpr):
    """The bodies of all Pallas kernels of a program."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if not hasattr(inner, "eqns"):
                continue
            if equation.primitive.name == "pallas_call":
                yield inner
            else:
                yield from kernels_in(inner)


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


@pytest.mark.parametrize("asked", ["tensorfloat32", "highest"])
@pytest.mark.parametrize("problem, name", KERNELS)
def test_the_precision_of_products_changes_no_program(problem, name, asked):
    function, arrays = problem(name)

    def program():
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(lambda *a: function(*a))(*arrays)))

    want = program()
    with jax.default_matmul_precision(asked):
        found = program()
    assert "dot" in want and found == want


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("problem, name", KERNELS)
def test_kernels_have_no_64_bit_numbers(problem, name):
    function, arrays = problem(name)
    with jax.enable_x64(True):
        inside = str(list(kernels_in(jax.make_jaxpr(function)(*arrays).jaxpr)))
        lowered(function, *arrays, platform="cuda" if name == "pallas_gpu" else "tpu")
    assert "64" not in re.findall(r"\b[fiu](64)\b", inside)


SETTINGS = {
    "highest": lambda: jax.default_matmul_precision("highest"),
    "64 bits": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("problem, name", KERNELS[3:])
def test_it_compiles_for_a_tpu(problem, name, setting, absent_tpu):
    """Mosaic refuses products of 16-bit factors that ask for more, and has no 64-bit numbers."""
    function, arrays = problem(name)
    place = absent_tpu("v5e:2x2")
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays]
    with SETTINGS[setting]():
        jax.jit(function).lower(*arrays).compile()
