"""The five kernels of KDA on a GPU; how they fit together is told in `pallas_gpu.py`.

Arrays of tokens are refs of one head, [C, .] of a chunk or [T, .] of a row. The arithmetic of 16
rows is in `pallas_gpu_chunk.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import pallas_gpu_chunk as blocks
from .pallas import dot

ROWS = blocks.ROWS
# Columns of the states that `transpose` holds at once: more would not fit into registers.
_VALUES = 32
# Channels that `score` and `prepare` hold at once, for the same reason.
_PART = 64
_LOG2_E = 1.4426950408889634


class Tuning(NamedTuple):
    """Warps of a program and stages of its pipeline, a pair a kernel."""

    score: tuple[int, int]
    prepare: tuple[int, int]
    advance: tuple[int, int]
    retreat: tuple[int, int]
    transpose: tuple[int, int]


class Plan(NamedTuple):
    """What is static of a call; widths are those of padded heads."""

    scale: float
    chunk: int
    group: int  # value heads a q/k head
    key: int
    value: int
    value_block: int  # columns of the state that one program carries through a row
    key_block: int  # channels of a program of `transpose`, whose gradients do not mix them
    dtype: jnp.dtype  # of q: what large products run in
    tuning: Tuning
    interpret: bool

    @property
    def to(self) -> blocks.Precision:
        """Of float32 products."""
        return blocks.precision(self.dtype, interpret=self.interpret)


def _large(plan: Plan, x, y, how: str):
    return dot(x, y, how, plan.dtype, plan.to.scores)


class _Rows(NamedTuple):
    """16 rows of the inputs, float32."""

    q: jax.Array
    k: jax.Array
    g: jax.Array  # to base 2
    beta: jax.Array  # [16, 1]
    b: jax.Array
    number: jax.Array | None  # [16]


def _rows(plan: Plan, at, q, k, g, beta, marks, part=slice(None)) -> _Rows:
    q, k = (ref[at, part].astype(jnp.float32) for ref in (q, k))
    beta = beta[at][:, None]
    number = None if marks is None else marks[0, at]
    return _Rows(q * plan.scale, k, _LOG2_E * g[at, part], beta, beta * k, number)


def _where(mark, x):
    """Rows of x where their mark is 1."""
    return x if mark is None else jnp.where(mark[:, None] > 0, x, 0.0)


def _meet(rows, columns, x):
    """Pairs of one segment."""
    return x if rows is None else jnp.where(rows[:, None] == columns[None, :], x, 0.0)


def _first_row(block):
    return block * ROWS


def score(plan: Plan, packed: bool, *refs):
    """16 rows of P and of L; one program a block of rows.

    In: q, k, g, beta and marks (where packed) of the chunk. Out: the block's rows.
    """
    q, k, g, beta, *marks, reads, overlaps = refs
    marks = marks[0] if packed else None
    count, width = plan.chunk // ROWS, min(plan.key, _PART)
    here = jax.lax.rem(pl.program_id(0), jnp.int32(count))
    own = pl.ds(_first_row(here), ROWS)
    number = None if marks is None else marks[0, own]

    def near(j, carry):
        x = _rows(plan, own, q, k, g, beta, marks, pl.ds(j * width, width))
        found = blocks.scores(x.q, x.b, x.k, x.g, blocks.pairs(number), plan.to)
        return tuple(a + b for a, b in zip(carry, found, strict=True))

    zero = jnp.zeros((ROWS, ROWS), jnp.float32)
    read, overlap = jax.lax.fori_loop(0, plan.key // width, near, (zero, zero))
    reads[:, own], overlaps[:, own] = read.astype(reads.dtype), overlap
    if count == 1:
        return
    parts = [pl.ds(first, width) for first in range(0, plan.key, width)]

    def decayed(part):
        x = _rows(plan, own, q, k, g, beta, marks, part)
        down = jnp.exp2(blocks.row_sums(x.g))
        return [(z * down).astype(plan.dtype) for z in (x.q, x.b)]

    rows = [decayed(part) for part in parts]

    def earlier(j, between):
        at = _first_row(here - 1 - j)
        there, read, overlap, carry = pl.ds(at, ROWS), zero, zero, []
        for part, (q_rows, b_rows), gap in zip(parts, rows, between, strict=True):
            y = _rows(plan, there, q, k, g, beta, marks, part)
            column = y.k * jnp.exp2(blocks.column_sums(y.g) + gap)
            read = read + _large(plan, q_rows, column, "nt")
            overlap = overlap + _large(plan, b_rows, column, "nt")
            carry.append(gap + blocks.across_block(y.g))
        other = None if marks is None else marks[0, there]
        reads[:, there] = _meet(number, other, read).astype(reads.dtype)
        overlaps[:, there] = _meet(number, other, overlap)
        return tuple(carry)

    def never(n, carry):
        there = pl.ds(_first_row(n), ROWS)
        reads[:, there], overlaps[:, there] = zero.astype(reads.dtype), zero
        return carry

    none = tuple(jnp.zeros((1, width), jnp.float32) for _ in parts)
    jax.lax.fori_loop(0, here, earlier, none)
    jax.lax.fori_loop(here + 1, count, never, 0)


def prepare(plan: Plan, packed: bool, transposing: bool, *refs):
    """One chunk, whatever state enters it: what the passes from chunk to chunk need.

    In: q, k, v (not for the backward pass), g, beta, L, marks (where packed). Out: q decayed from
    the chunk's start, k decayed to its end, W, the decay across the chunk, and U, or for the
    backward pass the inverse.
    """
    refs = list(refs)
    q, k = refs.pop(0), refs.pop(0)
    v = None if transposing else refs.pop(0)
    g, beta, overlaps = refs.pop(0), refs.pop(0), refs.pop(0)
    marks = refs.pop(0) if packed else None
    q_start, k_end, w, across, last = refs
    inverses = []
    for at in _blocks(plan):
        row = [overlaps[at, there] for there in _blocks(plan)[: len(inverses) + 1]]
        # L is zero between segments already.
        own = blocks.inverse(row[-1], blocks.pairs(None), plan.to)
        inverses.append([*blocks.inverse_row(own, row[:-1], inverses, plan.to), own])
    if transposing:
        zero = jnp.zeros((ROWS, ROWS), jnp.float32)
        for n, at in enumerate(_blocks(plan)):
            for m, there in enumerate(_blocks(plan)):
                last[at, there] = inverses[n][m] if m <= n else zero
    key_width, value_width = min(plan.key, _PART), min(plan.value, _PART)

    def times(row, columns):
        return sum(_large(plan, x, y, "nn") for x, y in zip(row, columns, strict=False))

    def keys(j, carry):
        part = pl.ds(j * key_width, key_width)
        before = behind = jnp.zeros((1, key_width), jnp.float32)
        entering = []
        for at, row in zip(_blocks(plan), inverses, strict=True):
            x = _rows(plan, at, q, k, g, beta, marks, part)
            running = None if marks is None else marks[1, at]
            start = _where(running, jnp.exp2(blocks.row_sums(x.g) + before))
            q_start[at, part] = (x.q * start).astype(q_start.dtype)
            entering.append((x.b * start).astype(plan.dtype))
            before = before + blocks.across_block(x.g)
            w[at, part] = times(row, entering).astype(w.dtype)
        decay = jnp.exp2(before)
        if marks is not None:
            decay = jnp.where(marks[1, plan.chunk - 1] > 0, decay, 0.0)
        across[part] = jnp.sum(decay, axis=0)
        for at in reversed(_blocks(plan)):
            x = _rows(plan, at, q, k, g, beta, marks, part)
            final = None if marks is None else marks[2, at]
            up = jnp.exp2(blocks.column_sums(x.g) + behind)
            k_end[at, part] = _where(final, x.k * up).astype(k_end.dtype)
            behind = behind + blocks.across_block(x.g)
        return carry

    def values(j, carry):
        part, right = pl.ds(j * value_width, value_width), []
        for at, row in zip(_blocks(plan), inverses, strict=True):
            right.append((beta[at][:, None] * v[at, part].astype(jnp.float32)).astype(plan.dtype))
            last[at, part] = times(row, right).astype(last.dtype)
        return carry

    jax.lax.fori_loop(0, plan.key // key_width, keys, 0)
    if not transposing:
        jax.lax.fori_loop(0, plan.value // value_width, values, 0)


def _blocks(plan: Plan) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, plan.chunk, ROWS)]


def advance(plan: Plan, count: int, save: bool, *refs):
    """Some columns of the state through all chunks of a row, and the outputs on the way.

    In: P, what `prepare` made, and the initial state. Out: o, the final state and, for the backward
    pass, what each token writes and the states at all chunks' edges.
    """
    reads, q_start, k_end, w, across, u, initial, o, final, *saved = refs

    def step(n, state):
        at, low = pl.ds(n * plan.chunk, plan.chunk), state.astype(plan.dtype)
        delta = u[at, :].astype(jnp.float32) - _large(plan, w[at, :], low, "nn")
        if save:
            saved[0][at, :] = delta.astype(saved[0].dtype)
            saved[1][n] = low
        out = _large(plan, q_start[at, :], low, "nn") + _large(plan, reads[at, :], delta, "nn")
        o[at, :] = out.astype(o.dtype)
        return across[n, :][:, None] * state + _large(plan, k_end[at, :], delta, "tn")

    state = jax.lax.fori_loop(0, count, step, initial[...])
    final[...] = state
    if save:
        saved[1][count] = state.astype(plan.dtype)


def retreat(plan: Plan, count: int, *refs):
    """Some columns of the state's gradient through all chunks of a row, from the last one.

    In: P, what `prepare` made, the gradients of the outputs and of the final state. Out: the
    gradients of each token's right-hand side beta (v - what is known), of the state after each
    chunk, and of the initial state.
    """
    reads, q_start, k_end, w, across, inverse, do, dfinal, dr, dstates, dinitial = refs

    def step(i, dstate):
        n = count - 1 - i
        at, low = pl.ds(n * plan.chunk, plan.chunk), dstate.astype(plan.dtype)
        dstates[n] = low
        ddelta = _large(plan, reads[at, :], do[at, :], "tn")
        ddelta = ddelta + _large(plan, k_end[at, :], low, "nn")
        dr[at, :] = dot(inverse[at, :], ddelta, "tn", precision=plan.to.scores).astype(dr.dtype)
        dread = _large(plan, q_start[at, :], do[at, :], "tn")
        return across[n, :][:, None] * dstate + dread - _large(plan, w[at, :], ddelta, "tn")

    dinitial[...] = jax.lax.fori_loop(0, count, step, dfinal[...])


def transpose(plan: Plan, packed: bool, *refs):
    """Gradients of some key channels of one chunk's inputs, 16 rows at a time, from the last.

    In: q, k, g, beta, the gradients of the outputs and of the right-hand sides, what each token
    writes, the states before and after the chunk, the gradient of the latter, marks. Out: the
    gradients of q, k and g, and what these channels add to that of beta.
    """
    refs = list(refs)
    q, k, g, beta, do, dr, delta, state, after, dstate = [refs.pop(0) for _ in range(10)]
    marks = refs.pop(0) if packed else None
    dq_out, dk_out, dg_out, dbeta_out = refs
    count, width = plan.chunk // ROWS, min(plan.value, _VALUES)

    def load(n):
        at = pl.ds(n * ROWS, ROWS)
        return at, _rows(plan, at, q, k, g, beta, marks)

    def outer(x, y):
        return _large(plan, x, y, "nt")

    def small(x, y, how):
        return dot(x, y, how, precision=plan.to.scores)

    def pairs(rows, columns):
        """Gradients of a block of P and of L."""
        writes = delta[columns, :]
        found = outer(do[rows, :], writes), -outer(dr[rows, :], writes)
        if marks is None:
            return found
        return tuple(_meet(marks[0, rows], marks[0, columns], x) for x in found)

    # Whatever is not needed across a loop is loaded after it: registers are what is short.
    def step(i, tail):
        here = count - 1 - i
        at = pl.ds(here * ROWS, ROWS)

        def earlier(j, carry):
            dq, db, between = carry
            there, y = load(here - 1 - j)
            column = y.k * jnp.exp2(blocks.column_sums(y.g) + between)
            dread, doverlap = pairs(at, there)
            dq, db = dq + small(dread, column, "nn"), db + small(doverlap, column, "nn")
            return dq, db, between + blocks.across_block(y.g)

        def later(n, carry):
            dk, between = carry
            there, y = load(n)
            down = jnp.exp2(blocks.row_sums(y.g) + between)
            dread, doverlap = pairs(there, at)
            dk = dk + small(dread, y.q * down, "tn") + small(doverlap, y.b * down, "tn")
            return dk, between + blocks.across_block(y.g)

        zeros, none = jnp.zeros((ROWS, g.shape[1]), jnp.float32), jnp.zeros_like(tail)
        dq, db, dk, before, behind = zeros, zeros, zeros, none, none
        if count > 1:
            dq, db, before = jax.lax.fori_loop(0, here, earlier, (zeros, zeros, none))
            dk, behind = jax.lax.fori_loop(here + 1, count, later, (zeros, none))

        def through_states(j, carry):
            dq, db, dk = carry
            part = pl.ds(j * width, width)
            dq = dq + outer(do[at, part], state[:, part])
            db = db - outer(dr[at, part], state[:, part])
            return dq, db, dk + outer(delta[at, part], dstate[:, part])

        from_start, b_from_start, to_end = jax.lax.fori_loop(
            0, plan.value // width, through_states, (zeros, zeros, zeros)
        )
        running, final = (None, None) if marks is None else (marks[1, at], marks[2, at])
        dq = dq + jnp.exp2(before) * _where(running, from_start)
        db = db + jnp.exp2(before) * _where(running, b_from_start)
        dk = dk + jnp.exp2(behind) * _where(final, to_end)
        x = _rows(plan, at, q, k, g, beta, marks)
        down, up = jnp.exp2(blocks.row_sums(x.g)), jnp.exp2(blocks.column_sums(x.g))
        grads = dq * down, db * down, dk * up
        dq, db, dk = blocks.scores_transposed(
            x.q, x.b, x.k, x.g, blocks.pairs(x.number), *pairs(at, at), grads, plan.to
        )
        dlog = x.q * dq + x.b * db - x.k * dk
        dg_out[at, :] = (blocks.sums_to_the_end(dlog) + tail).astype(dg_out.dtype)
        both = do[at, :].astype(jnp.float32) * delta[at, :].astype(jnp.float32)
        diagonal = jnp.sum(both, axis=1)[:, None]  # of P: no decay in it
        dq_out[at, :] = (plan.scale * (dq + diagonal * x.k)).astype(dq_out.dtype)
        dk = dk + diagonal * x.q + x.beta * db
        dk_out[at, :] = dk.astype(dk_out.dtype)
        dbeta_out[at] = jnp.sum(x.k * db, axis=1)
        return tail + blocks.across_block(dlog)

    def through(j, total):
        # Through the state after the chunk: its decay, and with it that of every write.
        part = pl.ds(j * width, width)
        product = after[:, part].astype(jnp.float32) * dstate[:, part].astype(jnp.float32)
        return total + jnp.sum(product, axis=1)

    tail = jnp.zeros(g.shape[1:], jnp.float32)
    tail = jax.lax.fori_loop(0, plan.value // width, through, tail)
    jax.lax.fori_loop(0, count, step, tail[None, :])
