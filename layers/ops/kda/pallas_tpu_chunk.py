"""The arithmetic of one chunk of one head, as the TPU kernels run it: arrays of [C, K] and [C, C].

The algorithm is that of `xla.py` and so are the letters: rows q (scaled) and b = beta*k, columns k,
P the reads and L the overlaps of writes. What differs is what suits a TPU.

Decays are kept as logs, sums of g over a run of tokens: all terms have one sign, so that nothing
cancels, and exp only ever sees numbers <= 0, however strong the gate. A pair (row r, column i) of
one tile of eight rows is reached by its distance r - i, whole chunks rolled against each other. Any
other pair belongs to the one block of 2*size rows that has a boundary between i and r in its
middle, and its decay is (boundary to row) * (column to boundary). Every such size is one product
of whole chunks of which the pairs of that size are kept: an MXU is wider than a chunk, and cutting
the blocks out would save it nothing. Blocks are told apart by r ^ i, whose highest bit is the size.

The state is held transposed, [V, K], so that a decay of key channels multiplies it along lanes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from .pallas import dot

# Rows of a float32 tile: pairs inside one are multiplied out, all others are matrix products.
TILE = 8


class Level(NamedTuple):
    """Logs of the decays of blocks of `size` rows, [C, K]."""

    size: int
    row: Array  # from the block's start to each row, that row included
    column: Array  # from after each row to the block's end


class Chunk(NamedTuple):
    """What both passes need of a chunk, float32; `dtype` is what its large products run in."""

    q: Array
    k: Array
    v: Array
    g: Array
    beta: Array  # [C, 1]
    b: Array
    distance: Array  # [C, C]: r - i
    pair: Array  # [C, C]: r ^ i where i < r in one segment, else 0
    levels: list[Level]
    entering: Array  # decay of the entering state up to each row; zero past its segment
    leaving: Array  # decay of each row's write to the end; zero before the last segment
    across: Array  # [1, K]: decay of the entering state across the chunk
    reads: Array  # P
    inverse: Array  # (I + L)^-1
    dtype: jnp.dtype


def _down(x: Array, count: int) -> Array:
    """Row r becomes row r + count; rows wrap."""
    return pltpu.roll(x, count, 0)


def _up(x: Array, count: int) -> Array:
    return pltpu.roll(x, x.shape[0] - count, 0)


def _levels(g: Array) -> list[Level]:
    """Levels of 8, 16, ..., C rows."""
    chunk, width = g.shape
    place = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0) & (TILE - 1)
    row, column = g, jnp.where(place < TILE - 1, _up(g, 1), 0.0)
    for step in (1, 2, 4):
        row = row + jnp.where(place >= step, _down(row, step), 0.0)
        column = column + jnp.where(place < TILE - step, _up(column, step), 0.0)
    levels, size = [Level(TILE, row, column)], TILE
    while size < chunk:
        row, column = (x.reshape(-1, 2, size, width) for x in (row, column))
        total = row[:, :, size - 1 :, :]
        row = jnp.concatenate([row[:, 0], row[:, 1] + total[:, 0]], axis=1)
        column = jnp.concatenate([column[:, 0] + total[:, 1], column[:, 1]], axis=1)
        row, column, size = row.reshape(g.shape), column.reshape(g.shape), 2 * size
        levels.append(Level(size, row, column))
    return levels


def _at(pair: Array, size: int) -> Array:
    """Pairs with the middle of a block of 2*size rows between them."""
    return (pair >= size) & (pair < 2 * size)


def _near(pair: Array, distance: Array, step: int) -> Array:
    """Pairs of one tile that are so many rows apart."""
    return (distance == step) & (pair > 0) & (pair < TILE)


def _scores(q, b, k, g, distance, pair, levels, dtype) -> tuple[Array, Array]:
    """P and (I + L)^-1."""
    chunk = q.shape[0]
    reads = jnp.where(distance == 0, jnp.sum(q * k, axis=1, keepdims=True), 0.0)
    overlaps, decay = jnp.zeros_like(reads), g
    for step in range(1, TILE):
        near, column = _near(pair, distance, step), _down(k, step) * jnp.exp(decay)
        reads = jnp.where(near, jnp.sum(q * column, axis=1, keepdims=True), reads)
        overlaps = jnp.where(near, jnp.sum(b * column, axis=1, keepdims=True), overlaps)
        decay = decay + _down(g, step)
    for size, row, column in levels[:-1]:
        decay = jnp.exp(row)
        rows = jnp.concatenate([q * decay, b * decay], axis=0)
        block, at = dot(rows, k * jnp.exp(column), "nt", dtype), _at(pair, size)
        reads = jnp.where(at, block[:chunk], reads)
        overlaps = jnp.where(at, block[chunk:], overlaps)
    inverse = jnp.where(distance == 0, 1.0, 0.0) - jnp.where(_at(pair, 1), overlaps, 0.0)
    size = 2
    while size < chunk:
        corner = jnp.where(_at(pair, size), overlaps, 0.0)
        inverse = inverse - dot(dot(inverse, corner, "nn"), inverse, "nn")
        size *= 2
    return reads, inverse


def _as_column(row: Float[Array, "1 C"], distance: Int[Array, "C C"]) -> Float[Array, "C 1"]:
    return jnp.sum(jnp.where(distance == 0, row, 0.0), axis=1, keepdims=True)


def as_row(column: Float[Array, "C 1"], distance: Int[Array, "C C"]) -> Float[Array, "1 C"]:
    """A column of numbers laid along lanes."""
    return jnp.sum(jnp.where(distance == 0, column, 0.0), axis=0, keepdims=True)


def prepare(
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    g: Float[Array, "C K"],
    beta: Float[Array, "1 C"],
    marks: Float[Array, "3 C"] | None,
    scale: float,
) -> Chunk:
    """Decays, P and the inverse. Rows of `marks`: each token's segment number, 1 where that is the
    segment which entered the chunk, 1 where it is the one which leaves it."""
    dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    chunk = q.shape[0]
    r = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    i = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    distance, pair = r - i, jnp.where(r > i, r ^ i, 0)
    levels = _levels(g)
    entering, leaving = jnp.exp(levels[-1].row), jnp.exp(levels[-1].column)
    if marks is not None:
        number, running, final = (_as_column(marks[j : j + 1], distance) for j in range(3))
        pair = jnp.where(number == marks[:1], pair, 0)
        entering = jnp.where(running > 0, entering, 0.0)
        leaving = jnp.where(final > 0, leaving, 0.0)
    q, beta = q * scale, _as_column(beta, distance)
    b = beta * k
    reads, inverse = _scores(q, b, k, g, distance, pair, levels, dtype)
    return Chunk(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        b=b,
        distance=distance,
        pair=pair,
        levels=levels,
        entering=entering,
        leaving=leaving,
        across=entering[chunk - 1 :],
        reads=reads,
        inverse=inverse,
        dtype=dtype,
    )


def deltas(x: Chunk, state: Float[Array, "V K"]) -> tuple[Array, Array]:
    """What each token writes, [C, V], and what the queries read of the entering state."""
    rows = jnp.concatenate([x.q * x.entering, x.b * x.entering], axis=0)
    known = dot(rows, state, "nt", x.dtype)
    chunk = x.q.shape[0]
    return dot(x.inverse, x.beta * x.v - known[chunk:], "nn", x.dtype), known[:chunk]


def advance(x: Chunk, state: Float[Array, "V K"]) -> tuple[Array, Array]:
    """Outputs [C, V] and the state after the chunk, both float32."""
    delta, known = deltas(x, state)
    o = known + dot(x.reads, delta, "nn", x.dtype)
    return o, x.across * state + dot(delta, x.k * x.leaving, "tn", x.dtype)


def transpose(
    x: Chunk,
    state: Float[Array, "V K"],
    do: Float[Array, "C V"],
    dstate: Float[Array, "V K"],
    scale: float,
) -> tuple[Array, ...]:
    """Gradients of q, k, v, g [C, .], of beta [1, C] and of the entering state, all float32.

    `do` and `dstate` are those of the chunk's outputs and of the state after it. As in `xla.py`,
    gradients of P and L stay in float32 whatever the inputs.
    """
    do, delta = do.astype(jnp.float32), deltas(x, state)[0]
    ddelta = dot(x.reads, do, "tn", x.dtype) + dot(x.k * x.leaving, dstate, "nt", x.dtype)
    dr = dot(x.inverse, ddelta, "tn")
    dbefore = x.across * dstate + dot(do, x.q * x.entering, "tn", x.dtype)
    dbefore = dbefore - dot(dr, x.b * x.entering, "tn", x.dtype)
    dq = x.entering * dot(do, state, "nn", x.dtype)
    db = -x.entering * dot(dr, state, "nn", x.dtype)
    dk = x.leaving * dot(delta, dstate, "nn", x.dtype)
    dacross = jnp.sum(x.k * dk, axis=0, keepdims=True)
    dacross = dacross + x.across * jnp.sum(state * dstate, axis=0, keepdims=True)
    dreads, doverlaps = dot(do, delta, "nt"), -dot(dr, delta, "nt")
    dq, db, dk = _scores_transposed(x, dreads, doverlaps, dq, db, dk)
    dlog = x.q * dq + x.b * db - x.k * dk
    dg = dacross + _sums_to_the_end(dlog)
    diagonal = jnp.sum(do * delta, axis=1, keepdims=True)  # of P: no decay in it
    dq = scale * (dq + diagonal * x.k)
    dk = dk + diagonal * x.q + x.beta * db
    dbeta = jnp.sum(x.k * db, axis=1, keepdims=True) + jnp.sum(x.v * dr, axis=1, keepdims=True)
    return dq, dk, x.beta * dr, dg, as_row(dbeta, x.distance), dbefore


def _scores_transposed(x: Chunk, dreads, doverlaps, dq, db, dk) -> tuple[Array, Array, Array]:
    """dq, db and dk (as a column) with what comes through P and L, but for P's diagonal."""
    chunk, decay = x.q.shape[0], x.g
    for size, row, column in x.levels[:-1]:
        down, up, at = jnp.exp(row), jnp.exp(column), _at(x.pair, size)
        both = jnp.concatenate([jnp.where(at, d, 0.0) for d in (dreads, doverlaps)], axis=0)
        drows = dot(both, x.k * up, "nn")
        dq, db = dq + down * drows[:chunk], db + down * drows[chunk:]
        rows = jnp.concatenate([x.q * down, x.b * down], axis=0)
        dk = dk + up * dot(both, rows, "tn")
    for step in range(1, TILE):
        near, factor = _near(x.pair, x.distance, step), jnp.exp(decay)
        dread, doverlap = (
            jnp.sum(jnp.where(near, d, 0.0), axis=1, keepdims=True) for d in (dreads, doverlaps)
        )
        column = factor * _down(x.k, step)
        dq, db = dq + dread * column, db + doverlap * column
        dk = dk + _up(factor * (dread * x.q + doverlap * x.b), step)
        decay = decay + _down(x.g, step)
    return dq, db, dk


def _sums_to_the_end(x: Array) -> Array:
    """Row r becomes the sum of rows r, r + 1, ... of the chunk."""
    place, step = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0), 1
    while step < x.shape[0]:
        x = x + jnp.where(place < x.shape[0] - step, _up(x, step), 0.0)
        step *= 2
    return x
