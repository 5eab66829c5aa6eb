"""Latent decoding by a Pallas kernel for NVIDIA GPUs (Triton lowering), split over the sequence.

A program reads one span of one row's slots, for up to 64 of the row's queries, and leaves a part of
their softmax; few sequences at long context would otherwise leave most multiprocessors idle
(flash-decoding, https://pytorch.org/blog/flash-decoding). Spans are of equal length within a row
and as long as its own last position asks. A block of latents is read once, for scores and values;
queries that are too many for one program are neighbours in the grid and share it through L2.

The columns are read in two pieces, values and the shared key behind them, because tiles have power
of two sides: 512 + 64, not 576.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from ....errors import InputError
from ..optional import check_triton
from ..optional import triton as plgpu
from ..pallas_call import pallas_call
from ..platform import REMEDY, check_floats, only_on
from ..precision import full
from .partial import HIDDEN, combine, part

_on_gpu = only_on("cuda", "pallas_gpu", "latent_decode")
# Smallest side of a tensor core's product, and the most queries whose values registers hold.
_MIN_SIDE, _MAX_ROWS = 16, 64
# Widest values: [64, V] float32 are a multiprocessor's registers.
_MAX_WIDTH = 512
# Programs that keep the multiprocessors of a large GPU (132 of an H100 or H200) busy.
_PROGRAMS = 264
# A span is at least so long, or combining costs more than reading.
_MIN_SPAN = 512


class _Plan(NamedTuple):
    """What is static of a call."""

    scale: float
    rows: int  # queries a program
    block: int  # slots a block
    splits: int
    values: int  # columns that are values
    shared: int  # columns behind them
    interpret: bool


def _power(width: int) -> int:
    return max(_MIN_SIDE, pl.next_power_of_2(width))


def _kernel(plan: _Plan, q, latent, counts, ends, o, lse):
    group, split, row = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(group * plan.rows, plan.rows)
    here = (group * plan.rows + jnp.arange(plan.rows)) < q.shape[1]
    end = ends[row]
    count = plgpu.load(counts.at[row, rows], mask=here, other=0)
    pieces = [(0, plan.values)] + ([(plan.values, plan.shared)] if plan.shared else [])

    def read(ref, where, inside):
        """Columns of values, and of the shared key; zeros outside."""
        for start, width in pieces:
            side = _power(width)
            mask = _mask(inside, width)
            yield plgpu.load(ref.at[row, where, _columns(start, side)], mask=mask, other=0.0)

    queries = list(read(q, rows, here))

    def add(step, carry):
        total, top, acc = carry
        slots = step * plan.block + jnp.arange(plan.block)
        where = pl.ds(step * plan.block, plan.block)
        some = [x.astype(q.dtype) for x in read(latent, where, slots < end)]
        scores = functools.reduce(operator.add, map(_scores, queries, some))
        seen = slots[None, :] < count[:, None]
        scores = jnp.where(seen, plan.scale * scores, HIDDEN)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, old = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
        values = _dot(weights.astype(q.dtype), some[0])
        return old * total + jnp.sum(weights, axis=1), new, old[:, None] * acc + values

    blocks = pl.cdiv(end, plan.block)
    each = pl.cdiv(blocks, plan.splits)
    first = jnp.minimum(split * each, blocks)
    carry = (
        jnp.zeros((plan.rows,), jnp.float32),
        jnp.full((plan.rows,), HIDDEN, jnp.float32),
        jnp.zeros((plan.rows, _power(plan.values)), jnp.float32),
    )
    total, top, acc = jax.lax.fori_loop(first, jnp.minimum(first + each, blocks), add, carry)
    out, log = part(total[:, None], top[:, None], acc)
    columns = _columns(0, acc.shape[1])
    plgpu.store(o.at[split, row, rows, columns], out, mask=_mask(here, plan.values))
    plgpu.store(lse.at[split, row, rows], log.reshape(plan.rows), mask=here)


def _mask(rows, width: int):
    """Of a tile: which of its rows, and of its columns those of the array."""
    side = _power(width)
    return rows[:, None] if side == width else rows[:, None] & (jnp.arange(side) < width)[None, :]


def _columns(start: int, side: int):
    # A static slice may not reach past the array, even where a mask hides what is there.
    return pl.ds(jnp.asarray(start, jnp.int32), side)


def _scores(queries, keys):
    return _dot(queries, keys, trans_b=True)


def _dot(x, y, trans_b=False):
    return plgpu.dot(x, y, trans_b=trans_b, precision=full(x.dtype))


def latent_decode_pallas_gpu(
    q: Float[Array, "B T N C"],
    latent: Float[Array, "B S C"],
    counts: Int[Array, "B T"],
    *,
    value_dim: int,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """`latent_decode` on an NVIDIA GPU; q and the latents are float32 or bfloat16.

    `counts` is how many of the first slots each query sees, 0..S. `interpret` runs the same kernel
    on any platform, slowly, for tests.

    Raises:
      InputError: another dtype, or more than 512 values; when lowered, another platform than CUDA.
    """
    check_triton("pallas_gpu")
    check_floats("pallas_gpu", q=q, latent=latent)
    if max(_power(value_dim), _power(latent.shape[2] - value_dim)) > _MAX_WIDTH:
        raise InputError(
            f"latent {latent.shape} with value_dim={value_dim} has more than {_MAX_WIDTH} columns "
            f'of values, or behind them, the limit of implementation="pallas_gpu": {REMEDY}'
        )
    batch, length, heads, width = q.shape
    capacity, rows = latent.shape[1], length * heads
    # Exact float32 products run without tensor cores, and larger tiles would leave the registers.
    wide = max(q.dtype.itemsize, latent.dtype.itemsize) > 2
    side = min(_MIN_SIDE if wide else _MAX_ROWS, _power(rows))
    groups = pl.cdiv(rows, side)
    wanted = pl.cdiv(_PROGRAMS, batch * groups)
    plan = _Plan(
        scale=scale,
        rows=side,
        # More would not fit into the shared memory of every kind of GPU beside 64 queries.
        block=_MIN_SIDE if wide else 32 if side == _MAX_ROWS else 64,
        splits=max(1, min(wanted, capacity // _MIN_SPAN)),
        values=value_dim,
        shared=width - value_dim,
        interpret=interpret,
    )
    q = q if interpret else _on_gpu(q)
    out = [
        jax.ShapeDtypeStruct((plan.splits, batch, rows, value_dim), jnp.float32),
        jax.ShapeDtypeStruct((plan.splits, batch, rows), jnp.float32),
    ]
    o, lse = pallas_call(
        functools.partial(_kernel, plan),
        grid=(groups, plan.splits, batch),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=8 if value_dim > 128 else 4, num_stages=2),
        interpret=interpret,
        name="latent_decode",
    )(q.reshape(batch, rows, width), latent, jnp.repeat(counts, heads, axis=1), counts.max(axis=1))
    o, _ = combine(o, lse)
    return o.astype(q.dtype).reshape(batch, length, heads, value_dim)
