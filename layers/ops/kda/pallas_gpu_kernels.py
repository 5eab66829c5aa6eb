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
    g: jax.Array
    beta: jax.Array  # [16, 1]
    b: jax.Array
    number: jax.Array | None  # [16]


def _rows(plan: Plan, at, q, k, g, beta, marks) -> _Rows:
    q, k = (ref[at, :].astype(jnp.float32) for ref in (q, k))
    beta = beta[at][:, None]
    number = None if marks is None else marks[0, at]
    return _Rows(q * plan.scale, k, g[at, :], beta, beta * k, number)


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
    count = plan.chunk // ROWS
    here = jax.lax.rem(pl.program_id(0), jnp.int32(count))
    x = _rows(plan, pl.ds(_first_row(here), ROWS), q, k, g, beta, marks)
    own = pl.ds(_first_row(here), ROWS)
    read, overlap = blocks.scores(x.q, x.b, x.k, x.g, blocks.pairs(x.number), plan.to)
    reads[:, own], overlaps[:, own] = read.astype(reads.dtype), overlap
    if count == 1:
        return
    down = jnp.exp(blocks.row_sums(x.g))
    rows, b_rows = x.q * down, x.b * down

    def earlier(j, between):
        there = pl.ds(_first_row(here - 1 - j), ROWS)
        y = _rows(plan, there, q, k, g, beta, marks)
        column = y.k * jnp.exp(blocks.column_sums(y.g) + between)
        read, overlap = (_large(plan, z, column, "nt") for z in (rows, b_rows))
        reads[:, there] = _meet(x.number, y.number, read).astype(reads.dtype)
        overlaps[:, there] = _meet(x.number, y.number, overlap)
        return between + blocks.across_block(y.g)

    def never(n, carry):
        there = pl.ds(_first_row(n), ROWS)
        zero = jnp.zeros((ROWS, ROWS), jnp.float32)
        reads[:, there], overlaps[:, there] = zero.astype(reads.dtype), zero
        return carry

    jax.lax.fori_loop(0, here, earlier, jnp.zeros((1, plan.key), jnp.float32))
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
    zero = jnp.zeros((ROWS, ROWS), jnp.float32)
    inverses, entering = [], []
    before = jnp.zeros((1, plan.key), jnp.float32)
    for n, at in enumerate(_blocks(plan)):
        row = [overlaps[at, there] for there in _blocks(plan)[: n + 1]]
        # L is zero between segments already.
        own = blocks.inverse(row[-1], blocks.pairs(None), plan.to)
        inverses.append([*blocks.inverse_row(own, row[:-1], inverses, plan.to), own])
        x = _rows(plan, at, q, k, g, beta, marks)
        running = None if marks is None else marks[1, at]
        start = _where(running, jnp.exp(blocks.row_sums(x.g) + before))
        q_start[at, :] = (x.q * start).astype(q_start.dtype)
        entering.append((x.b * start).astype(plan.dtype))
        before = before + blocks.across_block(x.g)
        known, written = 0.0, 0.0
        for there, block, rows in zip(_blocks(plan), inverses[-1], entering, strict=False):
            known = known + _large(plan, block, rows, "nn")
            if transposing:
                last[at, there] = block
            else:
                values = beta[there][:, None] * v[there, :].astype(jnp.float32)
                written = written + _large(plan, block, values, "nn")
        w[at, :] = known.astype(w.dtype)
        if transposing:
            for there in _blocks(plan)[n + 1 :]:
                last[at, there] = zero
        else:
            last[at, :] = written.astype(last.dtype)
    decay = jnp.exp(before)
    if marks is not None:
        decay = jnp.where(marks[1, plan.chunk - 1] > 0, decay, 0.0)
    across[...] = jnp.sum(decay, axis=0)
    behind = jnp.zeros((1, plan.key), jnp.float32)
    for at in reversed(_blocks(plan)):
        x = _rows(plan, at, q, k, g, beta, marks)
        final = None if marks is None else marks[2, at]
        up = jnp.exp(blocks.column_sums(x.g) + behind)
        k_end[at, :] = _where(final, x.k * up).astype(k_end.dtype)
        behind = behind + blocks.across_block(x.g)


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

    def step(i, tail):
        here = count - 1 - i
        at, x = load(here)
        do_here, dr_here, delta_here = do[at, :], dr[at, :], delta[at, :]

        def earlier(j, carry):
            dq, db, between = carry
            there, y = load(here - 1 - j)
            column = y.k * jnp.exp(blocks.column_sums(y.g) + between)
            dread = _meet(x.number, y.number, outer(do_here, delta[there, :]))
            doverlap = _meet(x.number, y.number, outer(dr_here, delta[there, :]))
            dq, db = dq + small(dread, column, "nn"), db - small(doverlap, column, "nn")
            return dq, db, between + blocks.across_block(y.g)

        def later(n, carry):
            dk, between = carry
            there, y = load(n)
            down = jnp.exp(blocks.row_sums(y.g) + between)
            dread = _meet(y.number, x.number, outer(do[there, :], delta_here))
            doverlap = _meet(y.number, x.number, outer(dr[there, :], delta_here))
            dk = dk + small(dread, y.q * down, "tn") - small(doverlap, y.b * down, "tn")
            return dk, between + blocks.across_block(y.g)

        zeros, none = jnp.zeros_like(x.g), jnp.zeros_like(tail)
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
        dq = dq + jnp.exp(before) * _where(running, from_start)
        db = db + jnp.exp(before) * _where(running, b_from_start)
        dk = dk + jnp.exp(behind) * _where(final, to_end)
        down, up = jnp.exp(blocks.row_sums(x.g)), jnp.exp(blocks.column_sums(x.g))
        dq, db, dk = dq * down, db * down, dk * up
        dreads, doverlaps = outer(do_here, delta_here), -outer(dr_here, delta_here)
        near = blocks.scores_transposed(
            x.q, x.b, x.k, x.g, blocks.pairs(x.number), dreads, doverlaps, plan.to
        )
        dq, db, dk = dq + near[0], db + near[1], dk + near[2]
        dlog = x.q * dq + x.b * db - x.k * dk
        dg_out[at, :] = (blocks.sums_to_the_end(dlog) + tail).astype(dg_out.dtype)
        both = do_here.astype(jnp.float32) * delta_here.astype(jnp.float32)
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
