"""KDA by Pallas kernels for TPU, forward and backward: one pass over the tokens each.

A grid step is a chunk of a few heads, chunks innermost and in order (backward: from the last), with
the float32 states in VMEM scratch from chunk to chunk: between the passes, what goes through HBM
are inputs, outputs and, where a backward pass will follow, the state that enters each chunk,
K*V/C floats a token and head. Scores, the inverse and what each token writes are computed again.

The arithmetic is in `pallas_tpu_chunk.py`. Heads are laid along lanes, [B, T, H*K] in blocks of
[C, K], so that arrays are not transposed; K and V are padded to whole lanes. Value heads of a group
read their q/k head by index.

Source: Kimi Linear report, section 3.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from .. import tuning
from . import pallas_tpu_chunk as chunks
from .pallas import check, group_sum, only_on, segment_marks, widen
from .shapes import shape_class

_LANES = 128
# Heads a grid step: their chains of small products are independent, and fill each other's gaps.
_HEADS_A_STEP = 2
_on_tpu = only_on("tpu", "pallas_tpu")


class _Plan(NamedTuple):
    """What is static of a call; widths are those of padded heads."""

    scale: float
    chunk: int
    heads: int  # value heads a grid step
    shared: int  # q/k heads a grid step
    group: int  # value heads a q/k head
    key: int
    value: int
    interpret: bool


# Kernels -------------------------------------------------------------------------------------


def _chunk(plan: _Plan, head: int, q, k, v, g, beta, marks) -> chunks.Chunk:
    """Reads one head of a grid step's blocks."""
    key, value = _lanes(head, plan.key), _lanes(head, plan.value)
    shared = _lanes(head * plan.shared // plan.heads, plan.key)
    marks = None if marks is None else marks[0, 0]
    tokens = (q[0, :, shared], k[0, :, shared], v[0, :, value], g[0, :, key])
    return chunks.prepare(*tokens, beta[0, head, 0], marks, plan.scale)


def _lanes(head: int, width: int) -> slice:
    return slice(head * width, (head + 1) * width)


def _forward_kernel(plan: _Plan, packed: bool, save: bool, *refs):
    refs = list(refs)
    *tokens, initial = [refs.pop(0) for _ in range(6)]
    marks = refs.pop(0) if packed else None
    o, final, *saved, state = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[0]

    for head in range(plan.heads):
        x = _chunk(plan, head, *tokens, marks)
        before = state[head]
        if save:
            saved[0][0, head, 0] = before
        out, state[head] = chunks.advance(x, before)
        o[0, :, _lanes(head, plan.value)] = out.astype(o.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        final[0] = state[...]


def _backward_kernel(plan: _Plan, packed: bool, *refs):
    refs = list(refs)
    *tokens, states, do, dfinal = [refs.pop(0) for _ in range(8)]
    marks = refs.pop(0) if packed else None
    dq, dk, dv, dg, dbeta, dinitial, dstate = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dfinal[0]

    for head in range(plan.heads):
        key, value = _lanes(head, plan.key), _lanes(head, plan.value)
        x = _chunk(plan, head, *tokens, marks)
        grads = chunks.transpose(x, states[0, head, 0], do[0, :, value], dstate[head], plan.scale)
        for ref, lanes, grad in zip((dq, dk, dv, dg), (key, key, value, key), grads, strict=False):
            ref[0, :, lanes] = grad.astype(ref.dtype)
        dbeta[0, head, 0], dstate[head] = grads[4:]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dinitial[0] = dstate[...]


# Calls ---------------------------------------------------------------------------------------


def _specs(plan: _Plan, count: int, reverse: bool) -> dict[str, pl.BlockSpec]:
    """Blocks of every kind of array; `reverse` walks the chunks from the last one."""

    def at(n):
        return count - 1 - n if reverse else n

    def tokens(width):
        return pl.BlockSpec((1, plan.chunk, width), lambda b, h, n: (b, at(n), h))

    def shared(b, h, n):
        steps = plan.group * plan.shared // plan.heads  # that read the same q/k heads
        # `//` of traced integers would ask which TPU this host has.
        return b, at(n), h if steps == 1 else jax.lax.div(h, jnp.int32(steps))

    state = (plan.value, plan.key)
    return {
        "shared": pl.BlockSpec((1, plan.chunk, plan.shared * plan.key), shared),
        "key": tokens(plan.heads * plan.key),
        "value": tokens(plan.heads * plan.value),
        "beta": pl.BlockSpec(
            (1, plan.heads, 1, 1, plan.chunk), lambda b, h, n: (b, h, at(n), 0, 0)
        ),
        "marks": pl.BlockSpec((1, 1, 3, plan.chunk), lambda b, h, n: (b, at(n), 0, 0)),
        "state": pl.BlockSpec((1, plan.heads, *state), lambda b, h, n: (b, h, 0, 0)),
        "states": pl.BlockSpec((1, plan.heads, 1, *state), lambda b, h, n: (b, h, at(n), 0, 0)),
    }


def _call(kernel, plan: _Plan, ins: dict, outs: dict, flops: int, *, reverse: bool):
    """Runs a kernel over (batch, heads, chunk); `ins`, `outs`: (kind of block, array) by name."""
    batch, length = ins["v"][1].shape[:2]
    count = length // plan.chunk
    value_heads = ins["v"][1].shape[2] // plan.value
    specs = _specs(plan, count, reverse)
    arrays = [x for _, x in ins.values()]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outs.values()]
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes))
    return pl.pallas_call(
        kernel,
        grid=(batch, value_heads // plan.heads, count),
        in_specs=[specs[kind] for kind, _ in ins.values()],
        out_specs=[specs[kind] for kind, _ in outs.values()],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((plan.heads, plan.value, plan.key), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=batch * value_heads * length * flops,
            bytes_accessed=moved,
            transcendentals=batch * value_heads * length * plan.key * 20,
        ),
        interpret=plan.interpret,
        name=kernel.func.__name__.strip("_").replace("kernel", "kda"),
    )(*arrays)


def _inputs(plan: _Plan, q, k, v, g, beta, marks) -> dict:
    """Arrays in the kernels' layout, by name, in the order of the kernels' arguments."""

    def lanes(x, width):
        return widen(x, width).reshape(*x.shape[:2], -1)

    batch, length, heads = beta.shape
    q = q if plan.interpret else _on_tpu(q)
    beta = jnp.swapaxes(beta.astype(jnp.float32), 1, 2)
    ins = {
        "q": ("shared", lanes(q, plan.key)),
        "k": ("shared", lanes(k, plan.key)),
        "v": ("value", lanes(v, plan.value)),
        "g": ("key", lanes(g, plan.key)),
        "beta": ("beta", beta.reshape(batch, heads, length // plan.chunk, 1, plan.chunk)),
    }
    return ins if marks is None else ins | {"marks": ("marks", marks)}


def _last(ins: dict, name: str) -> dict:
    """`name`, where it is there, moved to the end."""
    return {k: x for k, x in ins.items() if k != name} | {k: ins[k] for k in ins if k == name}


def _to_kernel(plan: _Plan, state: Float[Array, "B H K V"]) -> Float[Array, "B H Vp Kp"]:
    """Transposed and padded."""
    return jnp.swapaxes(widen(state, plan.key, plan.value), 2, 3)


def _run_forward(plan: _Plan, save: bool, q, k, v, g, beta, initial_state, marks):
    batch, length, heads, width = v.shape
    key = q.shape[-1]
    ins = _inputs(plan, q, k, v, g, beta, marks)
    ins = _last(ins | {"initial": ("state", _to_kernel(plan, initial_state))}, "marks")
    f32, state = jnp.float32, (plan.value, plan.key)
    count = length // plan.chunk
    outs = {
        "o": ("value", jax.ShapeDtypeStruct(ins["v"][1].shape, v.dtype)),
        "final": ("state", jax.ShapeDtypeStruct((batch, heads, *state), f32)),
        "states": ("states", jax.ShapeDtypeStruct((batch, heads, count, *state), f32)),
    }
    if not save:
        del outs["states"]
    flops = 6 * plan.key * plan.value + plan.chunk * (6 * plan.key + 4 * plan.value + plan.chunk)
    kernel = functools.partial(_forward_kernel, plan, marks is not None, save)
    o, final, *states = _call(kernel, plan, ins, outs, flops, reverse=False)
    o = o.reshape(batch, length, heads, plan.value)[..., :width]
    return (o, jnp.swapaxes(final, 2, 3)[:, :, :key, :width]), states


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kda(plan: _Plan, q, k, v, g, beta, initial_state, marks):
    return _run_forward(plan, False, q, k, v, g, beta, initial_state, marks)[0]


def _kda_forward(plan: _Plan, q, k, v, g, beta, initial_state, marks):
    out, (states,) = _run_forward(plan, True, q, k, v, g, beta, initial_state, marks)
    return out, (q, k, v, g, beta, marks, states)


def _kda_backward(plan: _Plan, residuals, cotangents):
    q, k, v, g, beta, marks, states = residuals
    do, dfinal = cotangents
    batch, length, heads, width = v.shape
    key = q.shape[-1]
    ins = _inputs(plan, q, k, v, g, beta, marks)
    ins |= {
        "states": ("states", states),
        "do": ("value", widen(do, plan.value).reshape(batch, length, -1)),
        "dfinal": ("state", _to_kernel(plan, dfinal)),
    }
    ins = _last(ins, "marks")

    def wide(dtype):
        return "key", jax.ShapeDtypeStruct((batch, length, heads * plan.key), dtype)

    # Value heads of a group add up to their q/k head's gradient, in float32.
    narrow = [x.dtype if plan.group == 1 else jnp.float32 for x in (q, k)]
    outs = {
        "dq": wide(narrow[0]),
        "dk": wide(narrow[1]),
        "dv": ("value", jax.ShapeDtypeStruct(ins["v"][1].shape, v.dtype)),
        "dg": wide(g.dtype),
        "dbeta": ("beta", jax.ShapeDtypeStruct(ins["beta"][1].shape, jnp.float32)),
        "dinitial": ("state", jax.ShapeDtypeStruct(ins["dfinal"][1].shape, jnp.float32)),
    }
    flops = 16 * plan.key * plan.value + 10 * plan.chunk * (plan.key + plan.value)
    kernel = functools.partial(_backward_kernel, plan, marks is not None)
    dq, dk, dv, dg, dbeta, dinitial = _call(kernel, plan, ins, outs, flops, reverse=True)

    dq, dk = (x.reshape(batch, length, heads, plan.key) for x in (dq, dk))
    dv = dv.reshape(batch, length, heads, plan.value)[..., :width]
    dg = dg.reshape(batch, length, heads, plan.key)[..., :key]
    dbeta = jnp.swapaxes(dbeta.reshape(batch, heads, length), 1, 2).astype(beta.dtype)
    dinitial = jnp.swapaxes(dinitial, 2, 3)[:, :, :key, :width]
    return group_sum(dq, q), group_sum(dk, k), dv, dg, dbeta, dinitial, None


_kda.defvjp(_kda_forward, _kda_backward)


def kda_pallas_tpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hv K"],
    beta: Float[Array, "B T Hv"],
    initial_state: Float[Array, "B Hv K V"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    chunk_size: int,
    interpret: bool = False,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """Chunkwise KDA on a TPU; both passes are kernels. Arguments as in `kda`.

    q, k and v are float32 or bfloat16, g and the states float32; products that are not of the
    inverse or of gradients of scores run in bfloat16 where q does, all others in float32. T must be
    a multiple of chunk_size, a power of two >= 16; padding tokens carry k=v=beta=g=0. Under a mesh,
    call it inside `jaxalope.sharding.kernel_map`, as the layer does. Reverse mode only.

    `interpret` runs the same kernels on any platform, slowly, for tests.

    Raises:
      InputError: another dtype, or heads wider than 256; when lowered, another platform than TPU.
    """
    check("pallas_tpu", q, k, v, g)
    key, value = (width + -width % _LANES for width in (q.shape[-1], v.shape[-1]))
    value_heads = v.shape[2]
    group = value_heads // q.shape[2]
    tuned = tuning.chosen("kda", shape_class(q.shape[-1], v.shape[-1]))
    heads = tuned.get("heads", _HEADS_A_STEP)
    while value_heads % heads or (heads % group and group % heads):
        heads -= 1
    shared = max(1, heads // group)
    plan = _Plan(scale, chunk_size, heads, shared, group, key, value, interpret)
    marks = None if segment_ids is None else segment_marks(segment_ids, chunk_size)
    return _kda(plan, q, k, v, g, beta, initial_state, marks)
