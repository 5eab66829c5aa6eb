"""The arithmetic of one chunk of a pack of heads, as the TPU kernels run it.

The algorithm is that of `xla.py` and so are the letters: rows q (scaled) and b, columns k, P the
reads and L the overlaps of writes. What differs is what suits a TPU; `bench/tpu_schedule.py` shows
what the compiler makes of it.

*Packs.* P heads lie side by side along lanes: tokens are [C, P*K] or [C, P*V], scores [C, P*C].
With P*C = 128 every register is full. `spread` makes the other factor of a product block-diagonal,
so that one product serves all heads of the pack.

*Decays* are kept as logs, sums of g over a run of tokens: all terms have one sign, so that nothing
cancels, and exp only ever sees numbers <= 0, however strong the gate. A pair (row r, column i < r)
belongs to the one block of 2*size rows that has its middle between i and r, and its decay is
(column to middle) * (middle to row). Every size, of log2(C), is one product of the chunk's rows
and columns, of which the pairs of that size are kept. The shortest sums are a product with a matrix
of zeros and ones, the others are made of these.

*Precision.* With float32 inputs everything is float32. With bfloat16 inputs products are of
bfloat16 factors, summed in float32. Logs, products of the inverse and gradients of scores go in as
two bfloat16 numbers, the `Halves` of a float32 number, that keep 16 bits of it.

*Steps.* What waits for a product is after a `yield`: see `in_turns`.

b is -beta*k here, so that L comes with its sign turned and nothing is subtracted. The state is held
transposed, [V, K], so that a decay of key channels multiplies it along lanes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .pallas import dot
from .pallas_tpu_steps import Step

LANES = 128
# Rows of a float32 tile: what is cut at multiples of it costs nothing.
_TILE = 8
# By how much `invert` widens its blocks at once.
_RADIX = 8
_LOG2_E = 1.4426950408889634
# Entries of `Tables.level` that are no size.
_DIAGONAL, _NONE = 100, -1


class Halves(NamedTuple):
    """A float32 number as the sum of two bfloat16 numbers, to 16 bits."""

    high: Array
    low: Array


class Tables(NamedTuple):
    """What is fixed by the chunk and the pack; numpy arrays outside of the kernels."""

    level: Array  # [C, P*C] int32: log2 of the size of each pair (r, i), or _NONE, or _DIAGONAL
    runs: Array  # [4*C, C or 2*C] 0 or 1: the tokens of each log that `_decays` starts from
    later: Array  # [C, C or 2*C] 0 or 1: the tokens that are not before each


class Chunk(NamedTuple):
    """What both passes need of a chunk; float32."""

    q: Array
    k: Array
    b: Array
    v: Array
    beta: list[Array]  # of each head, [C, 1]
    decays: list[Array | tuple[Array, Array]]  # of every size, see `_decays`
    entering: Array  # decay of the entering state up to each row; zero past its segment
    leaving: Array  # decay of each row's write to the end; zero before the last segment
    across: Array  # [1, P*K]: decay of the entering state across the chunk
    level: Array  # as in `Tables`, _NONE between segments
    later: Array  # as in `Tables`
    heads: int
    dtype: jnp.dtype


def pack_of(chunk: int, heads: int) -> int:
    """Heads side by side: as many as fill the lanes, of the heads of a grid step."""
    pack = max(1, LANES // chunk)
    while heads % pack:
        pack //= 2
    return pack


def _sizes(chunk: int) -> list[int]:
    return [1 << n for n in range(chunk.bit_length() - 1)]


@functools.lru_cache
def tables(chunk: int, pack: int, dtype: jnp.dtype) -> Tables:
    """The fixed numbers of a kernel's call, for inputs of `dtype`."""
    r, i = np.indices((chunk, chunk))
    pair = np.where(r > i, r ^ i, 0)
    level = np.where(pair > 0, np.log2(np.maximum(pair, 1)).astype(np.int32), _NONE)
    runs = []
    for size in (2, 4, 8):
        same = r // size == i // size
        row, column = same & (i <= r), same & (i > r)
        runs += [row, column] if size == _TILE else [np.where(r // size % 2 == 1, row, column)]
    level = np.tile(np.where(r == i, _DIAGONAL, level), (1, pack))
    sums = [np.concatenate(runs), r <= i]
    if dtype == jnp.bfloat16:  # of both halves
        sums = [np.concatenate([x, x], axis=1) for x in sums]
    return Tables(level.astype(np.int32), *(x.astype(dtype) for x in sums))


# Products of packs ---------------------------------------------------------------------------


def cut_heads(x: Array, heads: int) -> list[Array]:
    """The heads' lanes."""
    width = x.shape[1] // heads
    return [x[:, n * width : (n + 1) * width] for n in range(heads)]


def spread(x: Array, heads: int) -> Array:
    """Heads side by side, [N, P*W], to a block-diagonal matrix [P*N, P*W]."""
    if heads == 1:
        return x
    width = x.shape[1] // heads
    if width % LANES == 0:
        zero, blocks = jnp.zeros((x.shape[0], width), x.dtype), cut_heads(x, heads)
        rows = [
            jnp.concatenate([blocks[m] if m == n else zero for m in range(heads)], axis=1)
            for n in range(heads)
        ]
        return jnp.concatenate(rows, axis=0)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    zero = jnp.zeros_like(x)
    rows = [
        jnp.where((lane >= n * width) & (lane < (n + 1) * width), x, zero) for n in range(heads)
    ]
    return jnp.concatenate(rows, axis=0)


def along_lanes(columns: list[Array], width: int) -> Array:
    """A column a head, [C, 1], in all of the head's lanes."""
    wide = [jnp.broadcast_to(x, (x.shape[0], width)) for x in columns]
    return jnp.concatenate(wide, axis=1)


def halves(x: Float[Array, "..."]) -> Halves:
    """Cut by bits: no compiler sees a rounding that it could leave out."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFFF
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return Halves(high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16))


def _products(x: Array | Halves, ys: list[Array | Halves], heads: int) -> Step[list[Array]]:
    """x times each y, `spread` for the heads of a pack: in float32, or of halves to 16 bits."""
    if not isinstance(x, Halves):
        found = [dot(x, spread(y, heads), "nn") for y in ys]
        yield
        return found
    rows, both = x.high.shape[0], jnp.concatenate(x, axis=0)
    right = [Halves(*(spread(part, heads) for part in y)) for y in ys]
    long = [dot(both, y.high, "nn", jnp.bfloat16) for y in right]
    short = [dot(x.high, y.low, "nn", jnp.bfloat16) for y in right]
    yield
    return [a[:rows] + (a[rows:] + b) for a, b in zip(long, short, strict=True)]


def of_each(x: Array, y: Array, run, heads: int) -> list[Array]:
    """What `run` makes of the lanes of each head."""
    return [run(a, b) for a, b in zip(cut_heads(x, heads), cut_heads(y, heads), strict=True)]


# Decays ---------------------------------------------------------------------------------------


def first(x: Array, size: int) -> Array:
    """The first half of each block of 2*size rows."""
    return x.reshape(-1, 2, size, x.shape[1])[:, 0].reshape(-1, x.shape[1])


def second(x: Array, size: int) -> Array:
    """The second half of each block of 2*size rows."""
    return x.reshape(-1, 2, size, x.shape[1])[:, 1].reshape(-1, x.shape[1])


def join(first: Array, second: Array, size: int) -> Array:
    """Undoes `first` and `second`."""
    shape = (-1, 1, size, first.shape[1])
    both = jnp.concatenate([first.reshape(shape), second.reshape(shape)], axis=1)
    return both.reshape(-1, first.shape[1])


def _logs(g: Array, runs: Array) -> Array:
    """Sums of g over `Tables.runs`."""
    parts = halves(g) if runs.dtype == jnp.bfloat16 else [g]
    return dot(runs, jnp.concatenate(parts, axis=0), "nn", runs.dtype)


def _decays(g: Array, logs: Array) -> tuple[list, Array, Array]:
    """`Chunk.decays`, entering, leaving; of logs to base 2.

    Of a size, a token is a row or a column, by the half of its block that it is in; so there is one
    decay a token, from the middle to it or from it to the middle. Of halves that are whole tiles,
    the columns' decays and the rows' are apart.
    """
    chunk = g.shape[0]
    two, four, row, column = (logs[n * chunk : (n + 1) * chunk] for n in range(4))
    odd = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0) & 1
    found = [jnp.exp2(x) for x in (jnp.where(odd == 1, g, 0.0), two, four)]
    for size in _sizes(chunk)[3:]:
        (r1, r2), (c1, c2) = ((first(x, size), second(x, size)) for x in (row, column))
        found.append((jnp.exp2(c1), jnp.exp2(r2)))
        # A run that starts with a block, and one that ends with it, go on over the other half.
        t1, t2 = (_total(x, size) for x in (r1, r2))
        row, column = join(r1, r2 + t1, size), join(c1 + t2, c2, size)
    return found, jnp.exp2(row), jnp.exp2(column)


def _total(x: Array, size: int) -> Array:
    """The last of every `size` rows, in all of them."""
    blocks = x.reshape(-1, size, x.shape[1])
    return jnp.broadcast_to(blocks[:, size - 1 :], blocks.shape).reshape(x.shape)


def columns(x: Chunk, n: int) -> Array:
    """k with its decays of size 2**n; of tall blocks the columns alone, [C/2, P*K]."""
    if n == 0:  # from a column to the middle after it
        return x.k
    decay = x.decays[n]
    return first(x.k, 1 << n) * decay[0] if is_tall(x, n) else x.k * decay


def rows(x: Chunk, n: int) -> tuple[Array, Array]:
    """q and b with their decays of size 2**n, likewise."""
    decay = x.decays[n]
    if is_tall(x, n):
        return second(x.q, 1 << n) * decay[1], second(x.b, 1 << n) * decay[1]
    return x.q * decay, x.b * decay


def all_columns(x: Chunk, n: int) -> Array:
    """`columns`, and of tall blocks zeros for the rows; `spread`, as a factor."""
    found = columns(x, n)
    if is_tall(x, n):
        found = join(found, jnp.zeros_like(found), 1 << n)
    return spread(found.astype(x.dtype), x.heads)


def is_tall(x: Chunk, n: int) -> bool:
    """Whether halves of blocks are whole tiles, and are cut out."""
    return isinstance(x.decays[n], tuple)


def prepare(
    q: Float[Array, "C PK"],
    k: Float[Array, "C PK"],
    v: Float[Array, "C PV"],
    g: Float[Array, "C PK"],
    beta: Float[Array, "C P"],
    marks: tuple[Float[Array, "1 PC"], Float[Array, "C 3"]] | None,
    fixed: Tables,
    scale: float,
) -> Step[Chunk]:
    """A chunk as it is read.

    `marks`: each token's segment number along lanes; and, as columns, that number, 1 where it is
    the segment which entered the chunk, 1 where it is the one which leaves it.
    """
    dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
    heads, level, g = beta.shape[1], fixed.level, g * _LOG2_E
    logs = _logs(g, fixed.runs)
    yield
    decays, entering, leaving = _decays(g, logs)
    if marks is not None:
        number, (own, running, final) = marks[0], cut_heads(marks[1], 3)
        level = jnp.where(own == number, level, _NONE)
        entering = jnp.where(running > 0, entering, 0.0)
        leaving = jnp.where(final > 0, leaving, 0.0)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return Chunk(
        q=q * scale,
        k=k,
        b=along_lanes(cut_heads(-beta, heads), k.shape[1] // heads) * k,
        v=v,
        beta=cut_heads(beta, heads),
        decays=decays,
        entering=entering,
        leaving=leaving,
        across=entering[-1:],
        level=level,
        later=fixed.later,
        heads=heads,
        dtype=dtype,
    )


# Scores ---------------------------------------------------------------------------------------


def scores(x: Chunk) -> Step[tuple[Float[Array, "C PC"], Float[Array, "C PC"]]]:
    """P and -L."""
    chunk, reads, overlaps = x.q.shape[0], jnp.zeros(x.level.shape), jnp.zeros(x.level.shape)
    for n in range(len(x.decays)):
        left = rows(x, n)
        if n == 0:  # no decay on the diagonal
            left = [x.q, *left]
        left = jnp.concatenate(left, axis=0).astype(x.dtype)
        found = dot(left, all_columns(x, n), "nt", x.dtype)
        yield
        if n == 0:
            reads, found = jnp.where(x.level == _DIAGONAL, found[:chunk], 0.0), found[chunk:]
        count, size = found.shape[0] // 2, 1 << n
        parts = found[:count], found[count:]
        if is_tall(x, n):
            at = second(x.level, size) == n
            reads, overlaps = (
                join(first(old, size), jnp.where(at, new, second(old, size)), size)
                for old, new in zip((reads, overlaps), parts, strict=True)
            )
        else:
            reads, overlaps = (
                jnp.where(x.level == n, new, old)
                for old, new in zip((reads, overlaps), parts, strict=True)
            )
    return reads, overlaps


# The inverse ---------------------------------------------------------------------------------


def invert(x: Chunk, overlaps: Array) -> Step[Array]:
    """(I + L)^-1, [C, P*C], of -L; made to 16 bits, where inputs are bfloat16, and rounded.

    D, the inverse of blocks on the diagonal, becomes that of blocks eight times the size: with N
    what -L has between them and M = D N, which is nilpotent, it is (I + M) (I + M^2) (I + M^4) D.
    Powers of eight blocks stay small, whatever the keys; those of a whole chunk do not.
    """
    chunk, cut = x.q.shape[0], (lambda z: z) if x.dtype == jnp.float32 else halves
    found, size = jnp.where(x.level == _DIAGONAL, 1.0, 0.0), 1
    while size < chunk:
        wide = min(_RADIX * size, chunk)
        low, high = size.bit_length() - 1, wide.bit_length() - 1
        between = jnp.where((x.level >= low) & (x.level < high), overlaps, 0.0)
        power, left = cut(between), high - low
        if size == 1:  # D is I
            found, left = found + between, left - 1
            (power,) = yield from _products(power, [power], x.heads)
        else:
            (power,) = yield from _products(cut(found), [power], x.heads)
        while left > 1:
            power = cut(power)
            new, power = yield from _products(power, [cut(found), power], x.heads)
            found, left = found + new, left - 1
        (new,) = yield from _products(cut(power), [cut(found)], x.heads)
        found, size = found + new, wide
    return found.astype(x.dtype)


# The state -----------------------------------------------------------------------------------


def entering_rows(x: Chunk) -> Array:
    """What reads the entering state: of the outputs, and below it of the writes, [2*C, P*K]."""
    return jnp.concatenate([x.q * x.entering, x.b * x.entering], axis=0).astype(x.dtype)


def deltas(x: Chunk, inverse: Array, known: Array) -> Float[Array, "C PV"]:
    """What each token writes; `known` is what the writes read of the entering state."""
    beta = along_lanes(x.beta, x.v.shape[1] // x.heads)
    right = spread((beta * x.v + known).astype(x.dtype), x.heads)
    return dot(inverse, right, "nn", x.dtype)


def advance(
    x: Chunk, reads: Array, inverse: Array, states: list[Float[Array, "V K"]]
) -> Step[tuple[Float[Array, "C PV"], list[Float[Array, "V K"]]]]:
    """Outputs and the states after the chunk, both float32."""
    chunk, rows = x.q.shape[0], cut_heads(entering_rows(x), x.heads)
    known = [dot(part, s, "nt", x.dtype) for part, s in zip(rows, states, strict=True)]
    known = jnp.concatenate(known, axis=1)
    yield
    delta = deltas(x, inverse, known[chunk:]).astype(x.dtype)
    yield
    o = known[:chunk] + dot(reads, spread(delta, x.heads), "nn", x.dtype)
    writes = (x.k * x.leaving).astype(x.dtype)
    added = of_each(delta, writes, lambda d, w: dot(d, w, "tn", x.dtype), x.heads)
    across = cut_heads(x.across, x.heads)
    return o, [a * s + new for a, s, new in zip(across, states, added, strict=True)]
