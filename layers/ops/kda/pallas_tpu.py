"""KDA by Pallas kernels for TPU, forward and backward: one pass over the tokens each.

A grid step is a few chunks of a few heads, chunks innermost and in order (backward: from the last),
with the float32 states in VMEM scratch from chunk to chunk: between the passes, what goes through
HBM are inputs, outputs and, where a backward pass will follow, the state that enters each chunk,
K*V/C floats a token and head, with P and the inverse, 2*C numbers of q's dtype.

The arithmetic is in `pallas_tpu_chunk.py` and `pallas_tpu_transpose.py`: a task is a chunk of a
pack of heads, and the tasks of a grid step take turns. Heads are laid along lanes, [B, T, H*K], so
that arrays are not transposed; K and V are padded to whole lanes. Value heads of a group read their
q/k head by index.

Source: Kimi Linear report, section 3.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from .. import tuning
from ..pallas_call import pallas_call
from . import pallas_tpu_chunk as chunks
from . import pallas_tpu_transpose as transposed
from .pallas import check, group_sum, only_on, segment_marks, widen
from .pallas_tpu_steps import in_turns
from .shapes import shape_class

# Value heads a grid step, and tasks, packs of these times chunks; where the table has nothing.
_HEADS_A_STEP = 8
_TASKS = 8
# More than the 16 MiB that a kernel is given unasked; the smallest VMEM, TPU7x's, has 64.
_VMEM_BYTES = 48 * 2**20
# What a task takes of that for each number of its keys and values, by the bytes of an input's
# number: found by compiling the backward pass, with some to spare.
_TASK_BYTES = {2: 88, 4: 220}
_on_tpu = only_on("tpu", "pallas_tpu")


class _Plan(NamedTuple):
    """What is static of a call; widths are those of padded heads."""

    scale: float
    chunk: int
    heads: int  # value heads a grid step
    shared: int  # q/k heads a grid step
    group: int  # value heads a q/k head
    pack: int  # value heads side by side in a chunk's arithmetic
    chunks: int  # a grid step
    key: int
    value: int
    interpret: bool


# Kernels -------------------------------------------------------------------------------------


class _Tokens(NamedTuple):
    """The references of a grid step's tokens and of what goes with them."""

    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    g: jax.Ref
    beta: jax.Ref
    level: jax.Ref
    runs: jax.Ref
    later: jax.Ref

    def prepare(self, plan: _Plan, heads: range, n: int, marks):
        """Chunk n of some heads."""
        shared = [h * plan.shared // plan.heads for h in heads]
        if marks is not None:
            marks = marks[0][0, n], marks[1][0, n]
        return chunks.prepare(
            *(_read(x, plan, shared, n, plan.key) for x in (self.q, self.k)),
            _read(self.v, plan, heads, n, plan.value),
            _read(self.g, plan, heads, n, plan.key),
            self.beta[0, 0, _rows(plan, n), heads[0] : heads[-1] + 1],
            marks,
            chunks.Tables(*(x[...] for x in self[5:])),
            plan.scale,
        )


def _rows(plan: _Plan, n: int) -> slice:
    return slice(n * plan.chunk, (n + 1) * plan.chunk)


def _lanes(heads: Sequence[int], width: int) -> slice:
    return slice(heads[0] * width, (heads[-1] + 1) * width)


def _read(ref, plan: _Plan, heads: Sequence[int], n: int, width: int):
    """Heads of chunk n, side by side."""
    if len(set(heads)) == len(heads):
        return ref[0, _rows(plan, n), _lanes(heads, width)]
    parts = [ref[0, _rows(plan, n), _lanes([h], width)] for h in heads]
    return jnp.concatenate(parts, axis=1)


def _packs(plan: _Plan) -> list[range]:
    return [range(h, h + plan.pack) for h in range(0, plan.heads, plan.pack)]


def _forward_kernel(plan: _Plan, packed: bool, save: bool, *refs):
    refs = list(refs)
    *tokens, initial = [refs.pop(0) for _ in range(9)]
    tokens, marks = _Tokens(*tokens), [refs.pop(0) for _ in range(2)] if packed else None
    o, final, *saved, state = refs
    done = dict.fromkeys(_packs(plan), 0)  # chunks of each pack

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[0]

    def task(heads: range, n: int):
        x = yield from tokens.prepare(plan, heads, n, marks)
        reads, overlaps = yield from chunks.scores(x)
        inverse = yield from chunks.invert(x, overlaps)
        while done[heads] < n:
            yield
        before = [state[h] for h in heads]
        out, after = yield from chunks.advance(x, reads, inverse, before)
        o[0, _rows(plan, n), _lanes(heads, plan.value)] = out.astype(o.dtype)
        for h, new in zip(heads, after, strict=True):
            state[h] = new
        if save:
            states, scores = saved
            for h, old in zip(heads, before, strict=True):
                states[0, h, n] = old
            for part, x in enumerate((reads, inverse)):
                scores[0, heads[0] // plan.pack, n, part] = x.astype(scores.dtype)
        done[heads] += 1

    in_turns(task(heads, n) for n in range(plan.chunks) for heads in _packs(plan))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        final[0] = state[...]


def _backward_kernel(plan: _Plan, packed: bool, *refs):
    refs = list(refs)
    *tokens, states, scores, do, dfinal = [refs.pop(0) for _ in range(12)]
    tokens, marks = _Tokens(*tokens), [refs.pop(0) for _ in range(2)] if packed else None
    dq, dk, dv, dg, dbeta, dinitial, dstate = refs
    done = dict.fromkeys(_packs(plan), plan.chunks - 1)  # the chunk that is next

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dfinal[0]

    def task(heads: range, n: int):
        rows = _rows(plan, n)
        x = yield from tokens.prepare(plan, heads, n, marks)
        while done[heads] > n:
            yield
        found = yield from transposed.through_state(
            x,
            *scores[0, heads[0] // plan.pack, n],
            [states[0, h, n] for h in heads],
            do[0, rows, _lanes(heads, plan.value)],
            [dstate[h] for h in heads],
        )
        for h, new in zip(heads, found.dstates, strict=True):
            dstate[h] = new
        done[heads] -= 1
        grads = yield from transposed.through_scores(x, found, plan.scale)
        for ref, grad in zip((dq, dk, dv, dg), grads, strict=False):
            width = plan.value if ref is dv else plan.key
            ref[0, rows, _lanes(heads, width)] = grad.astype(ref.dtype)
        dbeta[0, 0, rows, heads[0] : heads[-1] + 1] = grads.beta

    last_first = reversed(range(plan.chunks))
    in_turns(task(heads, n) for n in last_first for heads in _packs(plan))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dinitial[0] = dstate[...]


# Calls ---------------------------------------------------------------------------------------


def _specs(plan: _Plan, count: int, reverse: bool) -> dict[str, pl.BlockSpec]:
    """Blocks of every kind of array; `reverse` walks the chunks from the last one."""

    def at(n):
        return count - 1 - n if reverse else n

    span = plan.chunks * plan.chunk

    def tokens(width):
        return pl.BlockSpec((1, span, width), lambda b, h, n: (b, at(n), h))

    def shared(b, h, n):
        steps = plan.group * plan.shared // plan.heads  # that read the same q/k heads
        # `//` of traced integers would ask which TPU this host has.
        return b, at(n), h if steps == 1 else jax.lax.div(h, jnp.int32(steps))

    state = (plan.value, plan.key)
    scores = (2, plan.chunk, plan.pack * plan.chunk)
    return {
        "shared": pl.BlockSpec((1, span, plan.shared * plan.key), shared),
        "key": tokens(plan.heads * plan.key),
        "value": tokens(plan.heads * plan.value),
        "beta": pl.BlockSpec((1, 1, span, plan.heads), lambda b, h, n: (b, h, at(n), 0)),
        "numbers": pl.BlockSpec(
            (1, plan.chunks, 1, plan.pack * plan.chunk), lambda b, h, n: (b, at(n), 0, 0)
        ),
        "marks": pl.BlockSpec((1, plan.chunks, plan.chunk, 3), lambda b, h, n: (b, at(n), 0, 0)),
        "state": pl.BlockSpec((1, plan.heads, *state), lambda b, h, n: (b, h, 0, 0)),
        "states": pl.BlockSpec(
            (1, plan.heads, plan.chunks, *state), lambda b, h, n: (b, h, at(n), 0, 0)
        ),
        "scores": pl.BlockSpec(
            (1, plan.heads // plan.pack, plan.chunks, *scores),
            lambda b, h, n: (b, h, at(n), 0, 0, 0),
        ),
    }


def _call(kernel, plan: _Plan, ins: dict, outs: dict, flops: int, *, reverse: bool):
    """Runs a kernel over (batch, heads, chunk); `ins`, `outs`: (kind of block, array) by name."""
    batch, length = ins["v"][1].shape[:2]
    count = length // (plan.chunk * plan.chunks)
    value_heads = ins["v"][1].shape[2] // plan.value
    specs = _specs(plan, count, reverse)
    arrays = [x for _, x in ins.values()]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outs.values()]
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes))
    return pallas_call(
        kernel,
        grid=(batch, value_heads // plan.heads, count),
        in_specs=[
            pl.BlockSpec(x.shape, lambda b, h, n: (0, 0)) if kind == "fixed" else specs[kind]
            for kind, x in ins.values()
        ],
        out_specs=[specs[kind] for kind, _ in outs.values()],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((plan.heads, plan.value, plan.key), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=batch * value_heads * length * flops,
            bytes_accessed=moved,
            # A decay a token of every size of block, and those of the state.
            transcendentals=batch * value_heads * length * plan.key * (plan.chunk.bit_length() + 1),
        ),
        interpret=plan.interpret,
        name=kernel.func.__name__.strip("_").replace("kernel", "kda"),
    )(*arrays)


def _inputs(plan: _Plan, q, k, v, g, beta, marks, more: dict) -> dict:
    """Arrays in the kernels' layout, by name, in the order of the kernels' arguments."""

    def lanes(x, width):
        return widen(x, width).reshape(*x.shape[:2], -1)

    q = q if plan.interpret else _on_tpu(q)
    fixed = chunks.tables(plan.chunk, plan.pack, q.dtype)
    ins = {
        "q": ("shared", lanes(q, plan.key)),
        "k": ("shared", lanes(k, plan.key)),
        "v": ("value", lanes(v, plan.value)),
        "g": ("key", lanes(g, plan.key)),
        "beta": ("beta", _by_step(plan, beta)),
        "level": ("fixed", jnp.asarray(fixed.level)),
        "runs": ("fixed", jnp.asarray(fixed.runs)),
        "later": ("fixed", jnp.asarray(fixed.later)),
    } | more
    if marks is None:
        return ins
    numbers = jnp.tile(marks[:, :, None, :, 0], (1, 1, 1, plan.pack))
    return ins | {"numbers": ("numbers", numbers), "marks": ("marks", marks)}


def _by_step(plan: _Plan, x: Float[Array, "B T H"]) -> Float[Array, "B steps T heads"]:
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, plan.heads).astype(jnp.float32), 1, 2)


def _to_kernel(plan: _Plan, state: Float[Array, "B H K V"]) -> Float[Array, "B H Vp Kp"]:
    """Transposed and padded."""
    return jnp.swapaxes(widen(state, plan.key, plan.value), 2, 3)


def _run_forward(plan: _Plan, save: bool, q, k, v, g, beta, initial_state, marks):
    batch, length, heads, width = v.shape
    key = q.shape[-1]
    initial = {"initial": ("state", _to_kernel(plan, initial_state))}
    ins = _inputs(plan, q, k, v, g, beta, marks, initial)
    f32, state = jnp.float32, (plan.value, plan.key)
    count = length // plan.chunk
    outs = {
        "o": ("value", jax.ShapeDtypeStruct(ins["v"][1].shape, v.dtype)),
        "final": ("state", jax.ShapeDtypeStruct((batch, heads, *state), f32)),
    }
    if save:
        low = jnp.bfloat16 if q.dtype == jnp.bfloat16 else f32
        scores = (2, plan.chunk, plan.pack * plan.chunk)
        outs |= {
            "states": ("states", jax.ShapeDtypeStruct((batch, heads, count, *state), f32)),
            "scores": (
                "scores",
                jax.ShapeDtypeStruct((batch, heads // plan.pack, count, *scores), low),
            ),
        }
    flops = 6 * plan.key * plan.value + plan.chunk * (6 * plan.key + 4 * plan.value + plan.chunk)
    kernel = functools.partial(_forward_kernel, plan, marks is not None, save)
    o, final, *saved = _call(kernel, plan, ins, outs, flops, reverse=False)
    o = o.reshape(batch, length, heads, plan.value)[..., :width]
    return (o, jnp.swapaxes(final, 2, 3)[:, :, :key, :width]), saved


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kda(plan: _Plan, q, k, v, g, beta, initial_state, marks):
    return _run_forward(plan, False, q, k, v, g, beta, initial_state, marks)[0]


def _kda_forward(plan: _Plan, q, k, v, g, beta, initial_state, marks):
    out, saved = _run_forward(plan, True, q, k, v, g, beta, initial_state, marks)
    return out, (q, k, v, g, beta, marks, *saved)


def _kda_backward(plan: _Plan, residuals, cotangents):
    q, k, v, g, beta, marks, states, scores = residuals
    do, dfinal = cotangents
    batch, length, heads, width = v.shape
    key = q.shape[-1]
    more = {
        "states": ("states", states),
        "scores": ("scores", scores),
        "do": ("value", widen(do, plan.value).reshape(batch, length, -1)),
        "dfinal": ("state", _to_kernel(plan, dfinal)),
    }
    ins = _inputs(plan, q, k, v, g, beta, marks, more)

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
    dbeta = jnp.swapaxes(dbeta, 1, 2).reshape(beta.shape).astype(beta.dtype)
    dinitial = jnp.swapaxes(dinitial, 2, 3)[:, :, :key, :width]
    return group_sum(dq, q), group_sum(dk, k), dv, dg, dbeta, dinitial, None


_kda.defvjp(_kda_forward, _kda_backward)


def _plan(q, v, scale: float, chunk: int, interpret: bool) -> _Plan:
    """Sizes of a call: those of the table or the defaults, as far as they divide what there is."""
    key, value = (width + -width % chunks.LANES for width in (q.shape[-1], v.shape[-1]))
    tuned = tuning.chosen("kda", shape_class(q.shape[-1], v.shape[-1]))
    most = _VMEM_BYTES // (_TASK_BYTES[q.dtype.itemsize] * max(chunk, chunks.LANES) * (key + value))
    tasks = max(1, min(tuned.get("tasks", _TASKS), most))
    value_heads, group = v.shape[2], v.shape[2] // q.shape[2]
    heads = min(tuned.get("heads", _HEADS_A_STEP), tasks * max(1, chunks.LANES // chunk))
    while value_heads % heads or (heads % group and group % heads):
        heads -= 1
    pack = chunks.pack_of(chunk, heads)
    count = v.shape[1] // chunk
    steps = max(1, tasks * pack // heads)
    while count % steps:
        steps -= 1
    return _Plan(
        scale=scale,
        chunk=chunk,
        heads=heads,
        shared=max(1, heads // group),
        group=group,
        pack=pack,
        chunks=steps,
        key=key,
        value=value,
        interpret=interpret,
    )


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

    q, k and v are float32 or bfloat16, g and the states float32. Where q is bfloat16 products are
    of bfloat16 factors, or, of logs, of the inverse and of gradients of scores, of factors of 16
    bits; else all are of float32. T must be a multiple of chunk_size, a power of two >= 16; padding
    tokens carry k=v=beta=g=0. Under a mesh, call it inside `jaxalope.sharding.kernel_map`, as the
    layer does. Reverse mode only.

    `interpret` runs the same kernels on any platform, slowly, for tests.

    Raises:
      InputError: another dtype, or heads wider than 256; when lowered, another platform than TPU.
    """
    check("pallas_tpu", q, k, v, g)
    plan = _plan(q, v, scale, chunk_size, interpret)
    marks = None if segment_ids is None else segment_marks(segment_ids, chunk_size, axis=3)
    return _kda(plan, q, k, v, g, beta, initial_state, marks)
