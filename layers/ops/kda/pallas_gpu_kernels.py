"""The seven kernels of KDA on a GPU; how they fit together is told in `pallas_gpu.py`.

Arrays of tokens are refs of one head, [C, .] of a chunk or [T, .] of a row. The arithmetic of a
chunk is in `pallas_gpu_chunk.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import pallas_gpu_chunk as blocks
from .pallas import dot

ROWS = blocks.ROWS
# Bytes of a token's channels that a program holds at once: more would not fit into registers.
_PART = 128
_LOG2_E = 1.4426950408889634


class Tuning(NamedTuple):
    """Warps of a program and stages of its pipeline, a pair a kernel."""

    score: tuple[int, int]
    solve: tuple[int, int]
    advance: tuple[int, int]
    decay: tuple[int, int]
    retreat: tuple[int, int]
    pairs: tuple[int, int]
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
    def part(self) -> int:
        """Channels that a program holds at once."""
        return _PART // self.dtype.itemsize

    @property
    def to(self) -> blocks.Precision:
        """Of products of float32 numbers."""
        return blocks.precision(self.dtype, interpret=self.interpret)


def _large(plan: Plan, x, y, how: str):
    return dot(x, y, how, plan.dtype, plan.to.scores)


class _Rows(NamedTuple):
    """Some channels of a chunk's inputs, float32."""

    q: jax.Array
    k: jax.Array
    g: jax.Array  # to base 2
    logs: list[jax.Array]  # its parts
    beta: jax.Array  # [C, 1]


def _rows(plan: Plan, q, k, g, beta, part=slice(None)) -> _Rows:
    q, k = (ref[:, part].astype(jnp.float32) for ref in (q, k))
    g, beta = _LOG2_E * g[:, part], beta[:][:, None]
    return _Rows(q, k, g, blocks.split(g, plan.to.parts), beta)


def _where(mark, x):
    """Rows of x where their mark is 1."""
    return x if mark is None else jnp.where(mark[:, None] > 0, x, 0.0)


class _Marks(NamedTuple):
    """Each token's segment, whether it is the one that entered the chunk, and that leaves it."""

    number: jax.Array | None = None
    entered: jax.Array | None = None
    leaves: jax.Array | None = None


def _marks(refs: list, packed: bool) -> _Marks:
    """Takes the marks out of the refs that are left."""
    if not packed:
        return _Marks()
    marks = refs.pop(0)
    return _Marks(*(marks[n, :] for n in range(3)))


def _decays(plan: Plan, x: _Rows, sums, marks: _Marks, out, part):
    """Writes q from the chunk's start, k to its end, the decay across; gives b from its start."""
    q_start, k_end, across = out
    start = _where(marks.entered, blocks.from_start(x.logs, sums, plan.to))
    q_start[:, part] = (x.q * (plan.scale * start)).astype(q_start.dtype)
    end = _where(marks.leaves, blocks.to_end(x.logs, sums, plan.to))
    k_end[:, part] = (x.k * end).astype(k_end.dtype)
    decay = blocks.across(x.g, plan.to)
    if marks.entered is not None:
        whole = jnp.sum(marks.entered * marks.leaves) > 0
        decay = jnp.where(whole, decay, 0.0)
    across[part] = jnp.sum(decay, axis=0)
    return x.beta * x.k * start


def score(plan: Plan, packed: bool, *refs):
    """P and L of a chunk, and the decays through it.

    In: sums, q, k, g, beta, marks (where packed). Out: P, L, q decayed from the chunk's start, k
    decayed to its end, the decay across it, b decayed from its start.
    """
    sums, q, k, g, beta, *refs = refs
    marks = _marks(refs, packed)
    reads, overlaps, *ends, b_start = refs
    width = min(plan.key, plan.part)

    def channels(j, carry):
        part = pl.ds(j * width, width)
        x = _rows(plan, q, k, g, beta, part)
        b_start[:, part] = _decays(plan, x, sums, marks, ends, part).astype(b_start.dtype)
        *found, itself = carry
        found = blocks.scores(x.q, x.k, x.logs, sums, tuple(found), plan.dtype, plan.to)
        return *found, itself + jnp.sum(x.q * x.k, axis=1)

    none, zero = jnp.zeros(plan.chunk, jnp.float32), jnp.zeros((plan.chunk,) * 2, jnp.float32)
    *found, itself = jax.lax.fori_loop(0, plan.key // width, channels, (zero, zero, none))
    read, overlap = (blocks.same(x, marks.number) for x in found)
    r, i = blocks.places(plan.chunk)
    read = blocks.below(read, jnp.where(r == i, itself[:, None], 0.0))
    reads[...] = (plan.scale * read).astype(reads.dtype)
    overlaps[...] = blocks.below(beta[:][:, None] * overlap, zero)


def solve(plan: Plan, save: bool, *refs):
    """What tokens of a chunk write where the state before it is zero, and take from that state.

    In: L, b decayed from the chunk's start, v, beta. Out: W, U and, for the backward pass, the
    inverse.
    """
    overlaps, b_start, v, beta, w, u, *saved = refs
    inverses = []
    for at in _blocks(plan):
        row = [overlaps[at, there] for there in _blocks(plan)[: len(inverses) + 1]]
        own = blocks.inverse(row[-1], plan.to)
        inverses.append([*blocks.inverse_row(own, row[:-1], inverses, plan.to), own])
    if save:
        zero = jnp.zeros((ROWS, ROWS), saved[0].dtype)
        for n, at in enumerate(_blocks(plan)):
            for m, there in enumerate(_blocks(plan)):
                saved[0][at, there] = inverses[n][m].astype(zero.dtype) if m <= n else zero

    def times(row, columns):
        return sum(_large(plan, x, y, "nn") for x, y in zip(row, columns, strict=False))

    def rows(width, load, out):
        def columns(j, carry):
            part, right = pl.ds(j * width, width), []
            for at, row in zip(_blocks(plan), inverses, strict=True):
                right.append(load(at, part).astype(plan.dtype))
                out[at, part] = times(row, right).astype(out.dtype)
            return carry

        jax.lax.fori_loop(0, out.shape[1] // width, columns, 0)

    rows(min(plan.key, plan.part), lambda *at: b_start[at], w)
    rows(
        min(plan.value, plan.part),
        lambda at, part: beta[at][:, None] * v[at, part].astype(jnp.float32),
        u,
    )


def _blocks(plan: Plan) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, plan.chunk, ROWS)]


def decay(plan: Plan, packed: bool, *refs):
    """The decays through a chunk once more, and W, for the backward pass.

    In: sums, q, k, g, beta, the inverse, marks (where packed). Out: q decayed from the chunk's
    start, k decayed to its end, the decay across it, W.
    """
    sums, q, k, g, beta, inverse, *refs = refs
    marks = _marks(refs, packed)
    *ends, w = refs
    width = min(plan.key, plan.part)

    def channels(j, carry):
        part = pl.ds(j * width, width)
        b_start = _decays(plan, _rows(plan, q, k, g, beta, part), sums, marks, ends, part)
        w[:, part] = _large(plan, inverse[...], b_start, "nn").astype(w.dtype)
        return carry

    jax.lax.fori_loop(0, plan.key // width, channels, 0)


def advance(plan: Plan, count: int, save: bool, *refs):
    """Some columns of the state through all chunks of a row, and the outputs on the way.

    In: P, q decayed from each chunk's start, k decayed to its end, the decay across it, W, U, the
    initial state. Out: o, the final state and, for the backward pass, what each token writes and
    the states before all chunks.
    """
    reads, q_start, k_end, across, w, u, initial, o, final, *saved = refs

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


def retreat(plan: Plan, count: int, *refs):
    """Some columns of the state's gradient through all chunks of a row, from the last one.

    In: P, the inverse, what `decay` made, the gradients of the outputs and of the final state. Out:
    the gradients of each token's right-hand side beta (v - what is known), of the state after each
    chunk, and of the initial state.
    """
    reads, inverse, q_start, k_end, across, w, do, dfinal, dr, dstates, dinitial = refs

    def step(i, dstate):
        n = count - 1 - i
        at, low = pl.ds(n * plan.chunk, plan.chunk), dstate.astype(plan.dtype)
        dstates[n] = low
        ddelta = _large(plan, reads[at, :], do[at, :], "tn")
        ddelta = ddelta + _large(plan, k_end[at, :], low, "nn")
        dr[at, :] = _large(plan, inverse[at, :], ddelta, "tn").astype(dr.dtype)
        dread = _large(plan, q_start[at, :], do[at, :], "tn")
        return across[n, :][:, None] * dstate + dread - _large(plan, w[at, :], ddelta, "tn")

    dinitial[...] = jax.lax.fori_loop(0, count, step, dfinal[...])


def pairs(plan: Plan, packed: bool, *refs):
    """Gradients of one chunk's scores, and of what its right-hand sides are made of.

    In: v, beta, the gradients of the outputs and of the right-hand sides, what each token writes,
    marks. Out: the gradients of P and L as `blocks.scores_transposed` takes them, and of P's
    diagonal; that of v, and what v adds to that of beta.
    """
    v, beta, do, dr, delta, *refs = refs
    marks = _marks(refs, packed)
    dreads, doverlaps, diagonal, dv, dbeta = refs
    width = min(plan.value, 2 * plan.part)

    def columns(j, carry):
        dread, doverlap, itself, from_v = carry
        part = pl.ds(j * width, width)
        writes, outs, sides = delta[:, part], do[:, part], dr[:, part].astype(jnp.float32)

        def both(rows, columns):
            lower, upper = (rows, writes), (writes, columns)
            return blocks.below(*(_large(plan, x, y, "nt") for x, y in (lower, upper)))

        values = beta[:][:, None] * sides
        dv[:, part] = values.astype(dv.dtype)
        products = outs.astype(jnp.float32) * writes.astype(jnp.float32)
        return (
            dread + both(outs, outs),
            doverlap - both(sides, values),
            itself + jnp.sum(products, axis=1),
            from_v + jnp.sum(v[:, part].astype(jnp.float32) * sides, axis=1),
        )

    none, zero = jnp.zeros(plan.chunk, jnp.float32), jnp.zeros((plan.chunk,) * 2, jnp.float32)
    steps = plan.value // width
    *found, itself, from_v = jax.lax.fori_loop(0, steps, columns, (zero, zero, none, none))
    dread, doverlap = (blocks.same(x, marks.number) for x in found)
    dreads[...] = (plan.scale * dread).astype(dreads.dtype)
    doverlaps[...] = doverlap.astype(doverlaps.dtype)
    diagonal[...], dbeta[...] = plan.scale * itself, from_v


def transpose(plan: Plan, packed: bool, *refs):
    """Gradients of some key channels of one chunk's inputs.

    In: sums, q, k, g, beta, the gradients of the outputs and of the right-hand sides, what each
    token writes, the state before the chunk, the gradient of that after it, the decay across it,
    the gradients of P, L and P's diagonal, marks. Out: the gradients of q, k and g, and what these
    channels add to that of beta.
    """
    sums, q, k, g, beta, do, dr, delta, state, dstate, *refs = refs
    across, dreads, doverlaps, diagonal, *refs = refs
    marks = _marks(refs, packed)
    dq_out, dk_out, dg_out, dbeta_out = refs

    def outer(x, y):
        return _large(plan, x[...], y[...], "nt")

    x = _rows(plan, q, k, g, beta)
    dq, db, dk = blocks.scores_transposed(
        x.q, x.k, x.logs, sums, dreads[...], doverlaps[...], plan.dtype, plan.to
    )
    # Loaded again, and written as soon as it is known: registers are what is short.
    x, itself = _rows(plan, q, k, g, beta), diagonal[:][:, None]
    start = _where(marks.entered, blocks.from_start(x.logs, sums, plan.to))
    dq = blocks.plus(dq, plan.scale * start, outer(do, state), plan.to)
    dq_out[...] = (dq + itself * x.k).astype(dq_out.dtype)
    db = blocks.plus(db, -start, outer(dr, state), plan.to)
    dbeta_out[...] = jnp.sum(x.k * db, axis=1)
    db = x.beta * db
    # Decays up to a row, then those to the chunk's end, then that across it: each adds up where it
    # is, as none of them is the difference of large numbers.
    dg = blocks.from_here_on(x.q * dq + x.k * (db - dk), sums, plan.to)
    end = _where(marks.leaves, blocks.to_end(x.logs, sums, plan.to))
    dk_end = end * outer(delta, dstate)
    dk_out[...] = (dk + dk_end + itself * x.q + db).astype(dk_out.dtype)
    dg = dg + blocks.before_here(x.k * dk_end, sums, plan.to)
    whole = state[...].astype(jnp.float32) * dstate[...].astype(jnp.float32)
    dg_out[...] = (dg + (across[:] * jnp.sum(whole, axis=1))[None, :]).astype(dg_out.dtype)
