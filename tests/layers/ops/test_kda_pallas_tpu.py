"""Where the TPU kernels of KDA run and where not; `test_kda_matrix.py` has the oracle."""

import functools

import jax
import jax.numpy as jnp
import kda_cases
import numpy as np
import pytest
from chips import lowered
from kda_cases import close, draw_heads, relative_rms, value_and_grads

from jaxalope.errors import InputError
from jaxalope.layers.ops import tuning
from jaxalope.layers.ops.kda import kda
from jaxalope.layers.ops.kda.pallas_tpu_steps import in_turns

run = functools.partial(kda_cases.run, implementation="pallas_tpu")


# Where they run and where not ----------------------------------------------------------------


def test_another_platform_is_named_when_lowering():
    arrays, _ = draw_heads(9)
    for call in (run, jax.jit(run), jax.grad(lambda a: jnp.sum(run(a)[0]))):
        with pytest.raises(InputError, match='"pallas_tpu" is being lowered for cpu: use impl'):
            call(arrays)
    assert lowered(run, arrays, platform="tpu").count("tpu_custom_call") == 1


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


# Packs and tasks ------------------------------------------------------------------------------


def test_tasks_take_turns_and_start_one_after_another():
    said = []

    def task(name, count):
        for n in range(count):
            said.append(f"{name}{n}")
            yield

    in_turns(task(name, count) for name, count in [("a", 3), ("b", 1), ("c", 2)])
    assert said == ["a0", "a1", "b0", "a2", "c0", "c1"]


@pytest.mark.long
@pytest.mark.parametrize(
    "heads, tasks, value_heads, length, chunk_size",
    [
        (4, 1, 4, 130, 64),  # two packs of two, a chunk a step
        (2, 4, 4, 250, 64),  # one pack, four chunks a step, twice two heads
        (8, 8, 8, 40, 32),  # two packs of four
        (3, 8, 3, 100, 64),  # no packs
    ],
)
def test_packs_of_wide_heads_equal_recurrence(
    heads, tasks, value_heads, length, chunk_size, monkeypatch
):
    """Heads of whole lanes, alone and in packs, across segments, both passes."""
    kda_cases.interpret(monkeypatch, "pallas_tpu")
    group = 2 if value_heads == 4 else 1
    arrays, cotangents = draw_heads(
        length, heads=value_heads // group, value_heads=value_heads, key=128, value=128
    )
    ids = jnp.asarray([[1] * 21 + [2] * 9 + [0] * 2 + [3] * (length - 32)])
    want = value_and_grads(arrays, cotangents, ids, implementation="reference")
    with tuning.trying("kda", heads=heads, tasks=tasks):
        got = value_and_grads(
            arrays, cotangents, ids, chunk_size=chunk_size, implementation="pallas_tpu"
        )
    close(got, want, 2e-5)


@pytest.mark.long
def test_repeated_keys_in_bfloat16(monkeypatch):
    """The inverse of a matrix of ones, from powers that 16 bits hold."""
    kda_cases.interpret(monkeypatch, "pallas_tpu")
    (q, k, v, g, beta, state), cotangents = draw_heads(128, heads=2, value_heads=2, key=16)
    k, g, beta = jnp.broadcast_to(k[:, :1], k.shape), jnp.zeros_like(g), jnp.ones_like(beta)
    k = k.at[..., 1:].set(0).at[..., 0].set(1.0)  # of length 1 in bfloat16 too
    low = (*(x.astype(jnp.bfloat16) for x in (q, k, v)), g, beta, state)
    exact = (*(x.astype(jnp.float32) for x in low[:3]), *low[3:])
    want = value_and_grads(exact, cotangents, implementation="reference")
    got = value_and_grads(low, cotangents, implementation="pallas_tpu")
    for found, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_rms(found, wanted) < 8e-3
