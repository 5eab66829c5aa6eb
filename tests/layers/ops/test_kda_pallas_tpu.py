"""Where the TPU kernels of KDA run and where not; `test_kda_matrix.py` has the oracle."""

import functools

import jax
import jax.numpy as jnp
import kda_cases
import numpy as np
import pytest
from kda_cases import draw_heads

from jaxalope.errors import InputError
from jaxalope.layers.ops.kda import kda

run = functools.partial(kda_cases.run, implementation="pallas_tpu")


# Where they run and where not ----------------------------------------------------------------


def test_another_platform_is_named_when_lowering():
    arrays, _ = draw_heads(9)
    for call in (run, jax.jit(run), jax.grad(lambda a: jnp.sum(run(a)[0]))):
        with pytest.raises(InputError, match='"pallas_tpu" is being lowered for cpu: use impl'):
            call(arrays)
    lowered = jax.jit(run).trace(arrays).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 1


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_the_kernels_do_not_take_is_named():
    (q, k, v, g, beta, _), _ = draw_heads(9)
    named = functools.partial(kda, implementation="pallas_tpu")
    with pytest.raises(InputError, match=r"v has dtype float16.*cast it"):
        named(q, k, v.astype(jnp.float16), g, beta)
    with pytest.raises(InputError, match="wider than 256"):
        named(*(jnp.zeros((1, 9, 1, 257)) for _ in range(4)), beta)
    with jax.enable_x64(True), pytest.raises(InputError, match="g has dtype float64"):
        named(q, k, v, np.asarray(g, np.float64), beta)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_both_passes_compile_ahead_of_time(topology, absent_tpu):
    place = absent_tpu(topology)
    arrays, cotangents = draw_heads(100, heads=2, value_heads=4, key=128, value=64)
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
