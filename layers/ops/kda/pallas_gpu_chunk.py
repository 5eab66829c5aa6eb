"""The arithmetic of a chunk as the GPU kernels run it: arrays of [C, K] and [C, C].

The algorithm is that of `xla.py` and so are the letters: rows q and b = beta*k, columns k, P the
reads and L the overlaps of writes. What differs is what suits Triton, whose registers cannot be
sliced, rolled or joined, and tensor cores, whose products of 64 rows cost less than what surrounds
them.

So logs of decays are products of g with matrices of zeros and ones (`sums`), in parts that lose
nothing that counts: sums of terms of one sign, so that nothing cancels and exp only ever sees
numbers <= 0, however strong the gate. Logs are to base 2, whose exponential is the shorter code.

Two tokens meet in the middle of the 2, 4, 8, ... or C tokens that they are in the two halves of.
For each of these sizes a token has one decay, from the middle or to it, and is a row (in the second
half) or a column (in the first), never both. One product then gives all pairs of a size, among many
that are thrown away, and backwards one product gives rows and columns their gradients: a symmetric
matrix of scores' gradients, times rows where rows are and columns where columns are. That is
log2(C) exponentials a number of the chunk, and two products a size each way. The sizes are a loop,
whose turns do not share registers.

The inverse is built from 16 rows upwards and stays in registers. TF32 would keep three of
float32's seven digits, and repeated keys make the powers of L huge: its products are of three TF32
parts, six digits. So are all products of float32 inputs: full float32 runs outside the tensor
cores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..optional import triton as pltriton
from .pallas import dot


class Precision(NamedTuple):
    """Of products of float32 numbers; see `precision`."""

    scores: jax.lax.Precision | None
    fine: jax.lax.Precision | jax.lax.DotAlgorithmPreset
    parts: int  # of eight bits, of a sum's terms
    interpret: bool


ROWS = 16  # of a block of the inverse: the fewest that a product of matrices has
# Where `sums` has what, the sizes of halves last.
_FROM_START, _AFTER, _TO_LAST, _BEFORE, _LEVELS = range(5)


def precision(dtype: jnp.dtype, *, interpret: bool) -> Precision:
    """What products of a call on q of this dtype may lose."""
    # Of the presets, other platforms have none.
    full, parts = jax.lax.Precision.HIGHEST, jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    fine = full if interpret else parts
    if dtype == jnp.float32:
        return Precision(fine, fine, 3, interpret)
    return Precision(None, fine, 2, interpret)


def sums(chunk: int) -> np.ndarray:
    """Matrices [_, C, C] of zeros and ones that add up rows: row r is which rows make sum r.

    Those up to r; those after r; those from r on; those before r; and for each size of halves,
    those between r and the middle of its 2*size rows.
    """
    r, i = np.ogrid[:chunk, :chunk]
    found = [i <= r, i > r, i >= r, i < r]
    for level in range(chunk.bit_length() - 1):
        size = 1 << level
        second = (r & size) > 0
        from_middle = second & (i <= r) & (i >= (r & -size))
        to_middle = ~second & (i > r) & (i <= (r | (size - 1)))
        found.append(from_middle | to_middle)
    return np.stack(found).astype(jnp.bfloat16)


def places(rows: int) -> tuple[Int[Array, "C C"], Int[Array, "C C"]]:
    """Row and column of each pair."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (rows, rows), axis) for axis in range(2))


def split(x: Float[Array, "C K"], count: int) -> list[Array]:
    """bfloat16 numbers that add up to a float32: its first eight digits, the next, the last.

    Cut off and not rounded: that is one instruction, where rounding takes a conversion and back.
    """
    found = []
    for _ in range(count - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        top = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(top.astype(jnp.bfloat16))
        x = x - top
    return [*found, x.astype(jnp.bfloat16)]


def _total(chosen: Array, parts: list[Array]) -> Array:
    return sum(dot(chosen, part, "nn", jnp.bfloat16) for part in parts)


def _instruction(name: str, *args: Array) -> Array:
    """One instruction a number, of float32 arrays of one shape."""
    (found,) = pltriton.elementwise_inline_asm(
        f"{name} {', '.join(f'${n}' for n in range(len(args) + 1))};",
        args=args,
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)],
    )
    return found


def exp2(x: Array, to: Precision) -> Array:
    """2^x for x <= 0, and 0 where that is no normal number: one instruction instead of four."""
    return jnp.exp2(x) if to.interpret else _instruction("ex2.approx.ftz.f32", x)


def plus(x: Array, y: Array, z: Array, to: Precision) -> Array:
    """x + y z: XLA leaves two instructions of it."""
    return x + y * z if to.interpret else _instruction("fma.rn.f32", y, z, x)


def from_start(g: list[Array], sums, to: Precision) -> Float[Array, "C K"]:
    """Decay from the chunk's start to each row, that row included."""
    return exp2(_total(sums[_FROM_START], g), to)


def to_end(g: list[Array], sums, to: Precision) -> Float[Array, "C K"]:
    """Decay from after each row to the chunk's end."""
    return exp2(_total(sums[_AFTER], g), to)


def across(g: Float[Array, "C K"], to: Precision) -> Float[Array, "1 K"]:
    """Decay across the chunk."""
    return exp2(jnp.sum(g, axis=0, keepdims=True), to)


def from_here_on(x: Float[Array, "C K"], sums, to: Precision) -> Array:
    """Row r becomes the sum of rows r, r + 1, ..."""
    return _total(sums[_TO_LAST], split(x, to.parts))


def before_here(x: Float[Array, "C K"], sums, to: Precision) -> Array:
    """Row r becomes the sum of rows 0, ..., r - 1."""
    return _total(sums[_BEFORE], split(x, to.parts))


def below(x: Float[Array, "C C"], other: Float[Array, "C C"]) -> Array:
    """x below the diagonal, and the other above and on it."""
    r, i = places(x.shape[0])
    return jnp.where(r > i, x, other)


def _levels(rows: int) -> int:
    return rows.bit_length() - 1


def _index(rows: int, axis: int, n: Int[Array, ""]) -> Array:
    """Which of the stretches of 2^n rows a row [C, 1], or a column [1, C], is in."""
    shape = (rows, 1) if axis == 0 else (1, rows)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) >> n


def _at(rows: int, n: Int[Array, ""]) -> Array:
    """Whether row and column are in the two halves of one stretch of 2^(n+1)."""
    return _index(rows, 0, n) == _index(rows, 1, n) ^ 1


def scores(
    q, k, g: list[Array], sums, found: tuple[Array, Array], dtype: jnp.dtype, to: Precision
) -> tuple[Array, Array]:
    """Adds what some channels make of P and of L, but for beta, below their diagonals.

    What it adds above means nothing.
    """

    def level(n, found):
        at, decay = _at(q.shape[0], n), exp2(_total(sums[_LEVELS + n], g), to)
        write = (k * decay).astype(dtype)
        more = (dot(x, write, "nt", dtype, to.scores) for x in (q * decay, write))
        return tuple(jnp.where(at, x + y, x) for x, y in zip(found, more, strict=True))

    return jax.lax.fori_loop(0, _levels(q.shape[0]), level, found)


def scores_transposed(
    q, k, g: list[Array], sums, dreads, doverlaps, dtype: jnp.dtype, to: Precision
) -> tuple[Array, Array, Array]:
    """Gradients of q, b and k (as a column) through the scores, but for P's diagonal.

    dreads and doverlaps have the gradient of a pair at [row, column] and at [column, row], the
    latter of L times the row's beta. So a product of one size has gradients of rows in the second
    half of its rows, and of columns in the first.
    """

    def level(n, grads):
        dq, db, dk = grads
        at, second = _at(q.shape[0], n), (_index(q.shape[0], 0, n) & 1) > 0
        decay = exp2(_total(sums[_LEVELS + n], g), to)
        row, column = jnp.where(second, decay, 0.0), jnp.where(second, 0.0, decay)
        none = jnp.zeros((), dtype)
        factor = jnp.where(second, q, k) * decay
        found = dot(jnp.where(at, dreads, none), factor, "nn", dtype, to.scores)
        dq, dk = plus(dq, row, found, to), plus(dk, column, found, to)
        found = dot(jnp.where(at, doverlaps, none), k * decay, "nn", dtype, to.scores)
        return dq, plus(db, row, found, to), plus(dk, column, found, to)

    zero = jnp.zeros_like(g[0], jnp.float32)
    return jax.lax.fori_loop(0, _levels(q.shape[0]), level, (zero, zero, zero))


def same(x: Float[Array, "C C"], number: Float[Array, "C"] | None) -> Array:
    """Pairs of one segment."""
    return x if number is None else jnp.where(number[:, None] == number[None, :], x, 0.0)


def inverse(overlaps: Float[Array, "16 16"], to: Precision) -> Array:
    """(I + L)^-1 of a block on the diagonal."""
    r, i = places(ROWS)
    pair = jnp.where(r > i, r ^ i, 0)
    result = jnp.where(r == i, 1.0, 0.0) - jnp.where(pair == 1, overlaps, 0.0)
    for level in (1, 2, 3):
        corner = jnp.where((pair >> level) == 1, overlaps, 0.0)
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
