"""The arithmetic of 16 rows of a chunk, as the GPU kernels run it: arrays of [16, K] and [16, 16].

The algorithm is that of `xla.py` and so are the letters: rows q (scaled) and b = beta*k, columns k,
P the reads and L the overlaps of writes. What differs is what suits Triton, whose registers cannot
be sliced, rolled or joined, and whose smallest matrix product has 16 rows.

So a chunk is taken 16 rows at a time, each its own load, and the logs of decays are products of g
with a matrix of zeros and ones, in parts that lose nothing: sums of terms of one sign, so that
nothing cancels and exp only ever sees numbers <= 0, however strong the gate. Logs are to base 2,
whose exponential is the shorter code. Pairs of rows in two
blocks meet at the boundary between them. Pairs in one block meet in the middle of the 2, 4, 8 or 16
rows that they are the two halves of: for each of these sizes a row has one decay, and one product
gives all pairs, told apart by r ^ i, whose highest bit is the size. That is four exponentials a
number of the block instead of one for each of its 16 columns. The sizes are a loop, whose turns do
not share registers.

The inverse is built from 16 rows upwards and stays in registers. TF32 would keep three of
float32's seven digits, and repeated keys make the powers of L huge: its products are of three TF32
parts, six digits. So are all products of float32 inputs: full float32 runs outside the tensor cores
and spills ten kilobytes a thread where this spills half of one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .pallas import dot


class Precision(NamedTuple):
    """Of float32 products; see `precision`."""

    scores: jax.lax.Precision | None
    fine: jax.lax.Precision | jax.lax.DotAlgorithmPreset


ROWS = 16
_LEVELS = 4  # halves of 1, 2, 4 and 8 rows


def precision(dtype: jnp.dtype, *, interpret: bool) -> Precision:
    """What products of a call on q of this dtype may lose."""
    # Of the presets, other platforms have none.
    full, parts = jax.lax.Precision.HIGHEST, jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    fine = full if interpret else parts
    return Precision(fine if dtype == jnp.float32 else None, fine)


def places() -> tuple[Int[Array, "16 16"], Int[Array, "16 16"]]:
    """Row and column of each pair of a block."""
    shape = (ROWS, ROWS)
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))


def _parts(x: Array) -> Iterator[Array]:
    """Three bfloat16 that add up to a float32: its first eight digits, the next, the last.

    Cut off and not rounded: that is one instruction, where rounding takes a conversion and back.
    """
    for _ in range(2):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        top = jax.lax.bitcast_convert_type(bits, jnp.float32)
        yield top.astype(jnp.bfloat16)
        x = x - top
    yield x.astype(jnp.bfloat16)


def _total(chosen: Array, g: Array) -> Array:
    """Sums of the chosen rows: zeros and ones are bfloat16, and so are three parts of a float32."""
    return sum(dot(chosen, part, "nn", jnp.bfloat16) for part in _parts(g))


def row_sums(g: Float[Array, "16 K"]) -> Array:
    """Log of the decay from the block's start to each row, that row included."""
    r, i = places()
    return _total(i <= r, g)


def column_sums(g: Float[Array, "16 K"]) -> Array:
    """Log of the decay from after each row to the block's end."""
    r, i = places()
    return _total(i > r, g)


def across_block(g: Float[Array, "16 K"]) -> Float[Array, "1 K"]:
    """Log of the decay across the block."""
    return jnp.sum(g, axis=0, keepdims=True)


def sums_to_the_end(x: Float[Array, "16 K"]) -> Array:
    """Row r becomes the sum of rows r, r + 1, ... of the block."""
    r, i = places()
    return _total(i >= r, x)


def _level(g: Array, size: Int[Array, ""]) -> Array:
    """Decays around the middle of each 2*size rows: of second-half rows from it, else to it."""
    r, i = places()
    second = (r & size) > 0
    from_middle = second & (i <= r) & (i >= (r & -size))
    to_middle = ~second & (i > r) & (i <= (r | (size - 1)))
    return jnp.exp2(_total(from_middle | to_middle, g))


def pairs(number: Float[Array, "16"] | None) -> Int[Array, "16 16"]:
    """r ^ i where i < r in one segment, else 0."""
    r, i = places()
    pair = jnp.where(r > i, r ^ i, 0)
    return pair if number is None else jnp.where(number[:, None] == number[None, :], pair, 0)


def _at(pair: Array, size: int | Int[Array, ""]) -> Array:
    return (pair >= size) & (pair < 2 * size)


def scores(q, b, k, g, pair, to: Precision) -> tuple[Array, Array]:
    """The block on the diagonal of P, and that of L."""
    r, i = places()
    reads = jnp.where(r == i, jnp.sum(q * k, axis=1)[:, None], 0.0)

    def level(n, carry):
        reads, overlaps = carry
        size = 1 << n
        at, decay = _at(pair, size), _level(g, size)
        column = k * decay
        reads = jnp.where(at, dot(q * decay, column, "nt", precision=to.scores), reads)
        overlaps = jnp.where(at, dot(b * decay, column, "nt", precision=to.scores), overlaps)
        return reads, overlaps

    return jax.lax.fori_loop(0, _LEVELS, level, (reads, jnp.zeros_like(reads)))


def scores_transposed(q, b, k, g, pair, dreads, doverlaps, grads, to: Precision):
    """Adds gradients of q, b and k (as a column) through such a block, but for P's diagonal."""

    def level(n, grads):
        dq, db, dk = grads
        size = 1 << n
        at, decay = _at(pair, size), _level(g, size)
        dread, doverlap = (jnp.where(at, x, 0.0) for x in (dreads, doverlaps))
        column = k * decay
        dq = dq + decay * dot(dread, column, "nn", precision=to.scores)
        db = db + decay * dot(doverlap, column, "nn", precision=to.scores)
        rows = dot(dread, q * decay, "tn", precision=to.scores)
        dk = dk + decay * (rows + dot(doverlap, b * decay, "tn", precision=to.scores))
        return dq, db, dk

    return jax.lax.fori_loop(0, _LEVELS, level, grads)


def inverse(overlaps: Float[Array, "16 16"], pair: Int[Array, "16 16"], to: Precision) -> Array:
    """(I + L)^-1 of a block on the diagonal."""
    r, i = places()
    result = jnp.where(r == i, 1.0, 0.0) - jnp.where(_at(pair, 1), overlaps, 0.0)
    for size in (2, 4, 8):
        corner = jnp.where(_at(pair, size), overlaps, 0.0)
        corner = dot(result, corner, "nn", precision=to.fine)
        result = result - dot(corner, result, "nn", precision=to.fine)
    return result


def inverse_row(
    own: Array, overlaps: list[Array], above: list[list[Array]], to: Precision
) -> list[Array]:
    """A block row of (I + L)^-1, left of its diagonal block `own`.

    `overlaps` are the row's blocks of L; above[m] is block row m of the inverse, m + 1 blocks.
    """
    row = []
    for column in range(len(overlaps)):
        total = None
        for m in range(column, len(overlaps)):
            part = dot(overlaps[m], above[m][column], "nn", precision=to.fine)
            total = part if total is None else total + part
        row.append(-dot(own, total, "nn", precision=to.fine))
    return row
