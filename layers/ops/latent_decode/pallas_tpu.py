"""Latent decoding by a Pallas kernel for TPU: blocks of the cache stream through VMEM, read once.

A grid step is one block of one row's slots, blocks innermost and in order, with the online softmax
of all the row's queries in VMEM scratch from block to block. The grid is as long as the longest row
asks (its bound is an array), and shorter rows stand still on their last block, which is then not
read again. Interior blocks need no masks. A block is taken in two pieces, so that the products of
one fill the wait for the other's softmax. On chips with two cores that share a grid, an odd number
of rows is split in two halves each, so that both cores read.

XLA lays an array out on a TPU so that least is padded: 576 columns of many slots lie with slots
along lanes, [C, S], and another order would copy the cache before every call. The kernel therefore
takes a block either way.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ....errors import InputError
from ..pallas_call import pallas_call
from ..platform import REMEDY, check_floats, only_on
from ..precision import full
from .partial import HIDDEN, combine, part

_on_tpu = only_on("tpu", "pallas_tpu", "latent_decode")
_LANES = 128
# Rows of a tile of 16-bit numbers.
_TILE = 16
# Most slots a block, bytes of it (there are two, and a masked copy), scores of it.
_MAX_BLOCK, _MAX_BYTES, _MAX_SCORES = 2048, 5 * 2**19, 2**18
# Queries of a row that the scratch has room for.
_MAX_ROWS = 1024


class _Plan(NamedTuple):
    """What is static of a call."""

    scale: float
    block: int  # slots a grid step
    pieces: int  # of a block, each with a softmax of its own
    splits: int
    values: int  # columns of values, whole tiles where there are as many
    turned: bool  # slots lie along lanes: a block is [C, block], not [block, C]
    interpret: bool


def _span(plan: _Plan, end, split):
    """First block of a split of a row that ends there, and the block after its last one."""
    blocks = _cdiv(end, plan.block)
    each = _cdiv(blocks, plan.splits)
    first = jnp.minimum(split * each, blocks)
    return first, jnp.minimum(first + each, blocks)


def _cdiv(x, y: int):
    # `//` of traced integers would ask which TPU this host has.
    return jax.lax.div(x + (y - 1), jnp.int32(y))


def _place(plan: _Plan, index):
    """The row and the split that an index of the grid's first axis stands for."""
    if plan.splits == 1:
        return index, 0
    splits = jnp.int32(plan.splits)
    return jax.lax.div(index, splits), jax.lax.rem(index, splits)


def _kernel(plan: _Plan, ends, alike, q, counts, latent, o, lse, total, top, acc):
    row, split = _place(plan, pl.program_id(0))
    first, stop = _span(plan, ends[row], split)
    block = first + pl.program_id(1)
    start = block * plan.block
    by_slot = 1 if plan.turned else 0  # the axis of a block that counts slots

    @pl.when(pl.program_id(1) == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, HIDDEN)
        acc[...] = jnp.zeros_like(acc)

    size = plan.block // plan.pieces

    def read(i, columns, masked):
        """The first columns of a piece of the block; zeros behind the row's end."""
        where = pl.ds(i * size, size)
        some = latent[0, :columns, where] if plan.turned else latent[0, where, :columns]
        some = some.astype(q.dtype)
        if masked:
            slots = start + i * size + _iota(size, by_slot)
            some = jnp.where(slots < ends[row], some, jnp.zeros_like(some))
        return some

    def scores(i, masked):
        found = plan.scale * _dot(q[0], read(i, latent.shape[2 - by_slot], masked), 1 - by_slot)
        if masked:
            seen = start + i * size + _iota(size, 1) < counts[0]
            found = jnp.where(seen, found, HIDDEN)
        return found

    def add(masked: bool):
        # All scores come first: the MXU is at work on a piece while the one before waits for its
        # scores to leave it, and for their maximum and exponentials.
        found = [scores(i, masked) for i in range(plan.pieces)]
        for i, one in enumerate(found):
            new = jnp.maximum(top[...], jnp.max(one, axis=1, keepdims=True))
            weights, old = jnp.exp(one - new), jnp.exp(top[...] - new)
            total[...] = old * total[...] + jnp.sum(weights, axis=1, keepdims=True)
            top[...] = new
            # Read anew, values need not wait in registers.
            values = _dot(weights.astype(q.dtype), read(i, plan.values, masked), by_slot)
            acc[...] = old * acc[...] + values

    # Slots that every query of the row sees.
    interior = start + plan.block <= alike[row]

    @pl.when((block < stop) & interior)
    def _():
        add(masked=False)

    @pl.when((block < stop) & jnp.logical_not(interior))
    def _():
        add(masked=True)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        o[0], lse[0] = part(total[...], top[...], acc[...])


def _iota(size: int, axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)


def _dot(x, y, side: int):
    return jax.lax.dot_general(
        x,
        y,
        (((1,), (side,)), ((), ())),
        precision=full(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _whole(size: int, unit: int) -> int:
    return size + -size % unit


def _turned(capacity: int, width: int, itemsize: int) -> bool:
    """Do fewer bytes lie idle if slots, not columns, fill the lanes?"""
    tile = 32 // itemsize
    by_column = _whole(capacity, tile) * _whole(width, _LANES)
    return _whole(capacity, _LANES) * _whole(width, tile) < by_column


def _block(capacity: int, rows: int, width: int, itemsize: int) -> int:
    """Slots a grid step: as many as fit, to outweigh a step's fixed cost."""
    row = _whole(width, _LANES) * itemsize
    if itemsize > 2:  # Exact products hold their operands in bfloat16 pieces, too.
        row *= 2
    most = min(_MAX_BLOCK, _MAX_BYTES // row, _MAX_SCORES // rows)
    most = max(_LANES, most - most % _LANES)
    return min(capacity, most)


def latent_decode_pallas_tpu(
    q: Float[Array, "B T N C"],
    latent: Float[Array, "B S C"],
    counts: Int[Array, "B T"],
    *,
    value_dim: int,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """`latent_decode` on a TPU; q and the latents are float32 or bfloat16.

    `counts` is how many of the first slots each query sees, 0..S. `interpret` runs the same kernel
    on any platform, slowly, for tests.

    Raises:
      InputError: another dtype, or more than 1024 queries a row (T times N); when lowered, another
        platform than TPU.
    """
    check_floats("pallas_tpu", q=q, latent=latent)
    batch, length, heads, width = q.shape
    capacity, rows = latent.shape[1], length * heads
    if rows > _MAX_ROWS:
        raise InputError(
            f"q {q.shape} has {rows} queries a row (T * N), more than the {_MAX_ROWS} that "
            f'implementation="pallas_tpu" takes: give fewer tokens at a time, or {REMEDY}'
        )
    padded = _whole(rows, _TILE)
    itemsize = max(q.dtype.itemsize, latent.dtype.itemsize)
    block = _block(capacity, padded, width, itemsize)
    splits = 2 if batch % 2 and capacity > block else 1
    turned = _turned(capacity, width, latent.dtype.itemsize)
    values = min(width, _whole(value_dim, _TILE if turned else _LANES))
    pieces = 1 if block % (2 * _LANES) else 2
    plan = _Plan(scale, block, pieces, splits, values, turned, interpret)
    ends, alike = counts.max(axis=1), counts.min(axis=1)
    steps = jnp.maximum(_cdiv(_cdiv(ends.max(), block), splits), 1)

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, padded - rows), (0, 0)))

    def own(index, step, ends, alike):
        row, _ = _place(plan, index)
        return row, 0, 0

    def slots(index, step, ends, alike):
        row, split = _place(plan, index)
        first, stop = _span(plan, ends[row], split)
        block = jnp.maximum(jnp.minimum(first + step, stop - 1), 0)
        return (row, 0, block) if turned else (row, block, 0)

    def out(index, step, ends, alike):
        return index, 0, 0

    q = q if interpret else _on_tpu(q)
    parts = batch * splits
    o, lse = pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(parts, steps),
            in_specs=[
                pl.BlockSpec((1, padded, width), own),
                pl.BlockSpec((1, padded, 1), own),
                pl.BlockSpec((1, width, block) if turned else (1, block, width), slots),
            ],
            out_specs=[
                pl.BlockSpec((1, padded, plan.values), out),
                pl.BlockSpec((1, padded, 1), out),
            ],
            scratch_shapes=[
                pltpu.VMEM((padded, 1), jnp.float32),
                pltpu.VMEM((padded, 1), jnp.float32),
                pltpu.VMEM((padded, plan.values), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((parts, padded, plan.values), jnp.float32),
            jax.ShapeDtypeStruct((parts, padded, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * rows * capacity * (width + value_dim),
            bytes_accessed=latent.size * latent.dtype.itemsize,
            transcendentals=batch * rows * capacity,
        ),
        interpret=interpret,
        name="latent_decode",
        # For who reads the compiled program: the grid's length is an array.
        metadata={"block": str(block), "splits": str(splits)},
    )(
        ends,
        alike,
        pad(q.reshape(batch, rows, width)),
        pad(jnp.repeat(counts, heads, axis=1)[:, :, None]),
        jnp.swapaxes(latent, 1, 2) if turned else latent,
    )
    # Parts first: [B * splits, ...] holds the splits of a row side by side.
    o = jnp.moveaxis(o.reshape(batch, splits, padded, -1), 1, 0)
    lse = jnp.moveaxis(lse.reshape(batch, splits, padded), 1, 0)
    o = combine(o, lse)[0][:, :rows, :value_dim]
    return o.astype(q.dtype).reshape(batch, length, heads, value_dim)
