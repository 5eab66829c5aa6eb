"""The GPU kernels of KDA: what is lowered for CUDA, where not, and the kernel for one token."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import kda_cases
import numpy as np
import pytest
from chips import lowered
from kda_cases import close, draw_heads, low_precision, value_and_grads

from jaxalope.errors import InputError
from jaxalope.layers.ops.kda import kda, kda_step, pallas_gpu, step

run = functools.partial(kda_cases.run, implementation="pallas_gpu")
TRITON = "__gpu$xla.gpu.triton"


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
class TestLowering:
    """Triton takes less than the interpreter does: sizes, slices, loops, grids."""

    @pytest.mark.parametrize(
        "chunk_size, dtype, packed, batched",
        [
            (16, jnp.bfloat16, False, True),
            (32, jnp.float32, True, False),
            (64, jnp.bfloat16, True, False),
        ],
    )
    def test_both_passes(self, chunk_size, dtype, packed, batched):
        arrays, cotangents = draw_heads(100, heads=2, value_heads=4, key=24, value=64)
        arrays = low_precision(arrays) if dtype == jnp.bfloat16 else arrays
        segment_ids = jnp.ones((1, 100), jnp.int32) if packed else None

        def both(arrays, cotangents):
            options = {"chunk_size": chunk_size}
            out, pullback = jax.vjp(lambda *a: run(a, segment_ids, **options), *arrays)
            return pullback((cotangents[0].astype(out[0].dtype), cotangents[1]))

        args = arrays, cotangents
        if batched:
            both, args = jax.vmap(both), jax.tree.map(lambda x: x[None], args)
        # score, solve, advance; decay, retreat, pairs, transpose.
        assert lowered(both, *args, platform="cuda").count(TRITON) == 7

    def test_one_token_is_one_kernel_in_place(self):
        arrays, _ = draw_heads(1, heads=2, value_heads=4, key=128, value=128)
        text = lowered(run, arrays, platform="cuda")
        assert text.count(TRITON) == 1
        assert "output_operand_alias" in text


def test_another_platform_is_named_when_lowering():
    for length in (1, 9):
        arrays, _ = draw_heads(length)
        for call in (run, jax.jit(run), jax.grad(lambda a: jnp.sum(run(a)[0]))):
            with pytest.raises(InputError, match='"pallas_gpu" is being lowered for cpu: use impl'):
                call(arrays)


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_the_kernels_do_not_take_is_named():
    (q, k, v, g, beta, state), _ = draw_heads(9)
    named = functools.partial(kda, implementation="pallas_gpu")
    with pytest.raises(InputError, match=r"v has dtype float16.*cast it"):
        named(q, k, v.astype(jnp.float16), g, beta)
    with pytest.raises(InputError, match="wider than 256"):
        named(*(jnp.zeros((1, 9, 1, 257)) for _ in range(4)), beta)
    one = (x[:, 0] for x in (q, k, v, g, beta))
    with pytest.raises(InputError, match="implementation='fast' is not one of: xla, pallas_gpu"):
        kda_step(*one, state, implementation="fast")


@pytest.mark.device
def test_steps_equal_the_recurrence(monkeypatch):
    """Through `kda_step` and `kda`, with groups, a padding token, and in bfloat16."""
    kda_cases.interpret(monkeypatch, "pallas_gpu")
    arrays, cotangents = draw_heads(3, batch=2, heads=2, value_heads=4, key=20, value=24)
    want = kda_cases.run(arrays, implementation="reference")
    *tokens, state = arrays
    outs = []
    for t in range(3):
        one = (x[:, t] for x in tokens)
        o, state = kda_step(*one, state, implementation="pallas_gpu")
        outs.append(o)
    close((jnp.stack(outs, 1), state), want, 1e-6)
    first = (*(x[:, :1] for x in tokens), arrays[-1])
    cotangents = (cotangents[0][:, :1], cotangents[1])
    segment_ids = jnp.asarray([[0], [1]])
    for arrays in (first, low_precision(first)):
        want = value_and_grads(arrays, cotangents, segment_ids, implementation="reference")
        got = value_and_grads(arrays, cotangents, segment_ids, implementation="pallas_gpu")
        jax.tree.map(lambda g, w: np.testing.assert_equal(g.dtype, w.dtype), got, want)
        close(got, want, 1e-6 if arrays is first else 2e-2)


def test_the_state_is_split_until_the_processors_are_busy():
    """A program carries fewer columns where there are fewer heads."""
    widths = []
    for heads in (2, 32, 96):
        q = jax.ShapeDtypeStruct((1, 64, heads, 128), jnp.bfloat16)
        widths.append(pallas_gpu.plan(q, q, 1.0, 64, False).value_block)
    assert widths == [16, 32, 64]
    assert set(step.STEPS) == {"xla", "pallas_gpu"}


def test_without_the_triton_lowering_all_else_works():
    """JAX 0.12 announces that it will go."""
    code = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import jax.numpy as jnp
from jaxalope import InputError
from jaxalope.layers.ops import kda, latent_decode
x = jnp.ones((1, 2, 1, 4))
arrays = (x, x, x, -x, x[..., 0])
kda.kda(*arrays)
for run in (
    lambda: kda.kda(*arrays, implementation="pallas_gpu"),
    lambda: latent_decode.latent_decode(
        x, x[:, :, 0], positions=jnp.array([[0, 1]]), value_dim=2, scale=1.0,
        implementation="pallas_gpu",
    ),
):
    try:
        run()
    except InputError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.count("needs the Triton lowering of Pallas") == 2, found.stderr


@pytest.mark.long
def test_the_benchmark_compares_before_it_times(tmp_path):
    """All of it but the chip: both passes, fixed and packed rows, one token."""
    script = pathlib.Path(__file__).parents[3] / "bench" / "kda_gpu.py"
    sizes = ["--heads=2", "--lengths=80", "--width=16", "--segments=3", "--turns=1", "--calls=1"]
    command = [sys.executable, script, "--interpret", *sizes, f"--output={tmp_path / 'rows.jsonl'}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["form"] for row in rows] == ["pallas_gpu", "xla"] * 5
    assert all(row["error"] < 1e-2 and len(row["wall_s"]) == 1 for row in rows)
