"""The backward pass over one chunk of a pack of heads; `pallas_tpu_chunk.py` has the forward one.

Letters, layouts and precision are those of the forward pass. b is -beta*k, so with A = (I + L)^-1,
R = beta*v + (b * entering) S and writes A R, gradients of what is called -L there are dR writes^T.
Gradients of P and L keep 16 bits of both factors where inputs are bfloat16: what is summed over
them, the gradient of g most of all, is a small difference of large terms.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .pallas import dot
from .pallas_tpu_chunk import (
    Chunk,
    all_columns,
    along_lanes,
    cut_heads,
    deltas,
    entering_rows,
    first,
    halves,
    is_tall,
    join,
    of_each,
    rows,
    second,
    spread,
)
from .pallas_tpu_steps import Step


class ThroughState(NamedTuple):
    """Gradients but for what comes through the scores; float32."""

    do: Array  # [C, P*V], as given
    delta: Array  # what each token writes
    dr: Array  # of R
    dq: Array  # of q, b and k (as a column)
    db: Array
    dk: Array
    dlog: Array  # [1, P*K]: of the log of every token's decay
    dstates: list[Array]  # of the entering states, [V, K]


class Gradients(NamedTuple):
    """Of a chunk's tokens; float32."""

    q: Float[Array, "C PK"]
    k: Float[Array, "C PK"]
    v: Float[Array, "C PV"]
    g: Float[Array, "C PK"]
    beta: Float[Array, "C P"]


def through_state(
    x: Chunk,
    reads: Array,
    inverse: Array,
    states: list[Float[Array, "V K"]],
    do: Float[Array, "C PV"],
    dstates: list[Float[Array, "V K"]],
) -> Step[ThroughState]:
    """The part that the chunks before this one wait for.

    `reads` and `inverse` are as in `advance`, `states` enter the chunk, `do` and `dstates` are of
    its outputs and of the states after it.
    """
    chunk, heads, low = x.q.shape[0], x.heads, x.dtype
    # Turned, the heads of a pack lie one above the other, [P*C, C].
    turned_reads, turned_inverse = reads.astype(low).T, inverse.T
    entering = entering_rows(x)
    known = [
        dot(part, s, "nt", low)
        for part, s in zip(cut_heads(entering[chunk:], heads), states, strict=True)
    ]
    yield
    delta = deltas(x, inverse, jnp.concatenate(known, axis=1))
    leaving = (x.k * x.leaving).astype(low)
    ddelta = [
        dot(p, part, "nn", low) + dot(w, ds, "nt", low)
        for p, part, w, ds in zip(
            _stacked(turned_reads, heads),
            cut_heads(do, heads),
            cut_heads(leaving, heads),
            dstates,
            strict=True,
        )
    ]
    yield
    # Neighbours' gradients may be large and alike, and dr their difference.
    parts = [_parts(part, low) for part in ddelta]
    dr = [
        dot(jnp.concatenate([p] * len(part), axis=1), jnp.concatenate(part, axis=0), "nn", low)
        for p, part in zip(_stacked(turned_inverse, heads), parts, strict=True)
    ]
    yield
    dr = jnp.concatenate(dr, axis=1)
    both = jnp.concatenate([do.astype(jnp.float32), dr], axis=0).astype(low)
    new = of_each(both, entering, lambda a, b: dot(a, b, "tn", low), heads)
    read = [dot(a, s, "nn", low) for a, s in zip(cut_heads(both, heads), states, strict=True)]
    write = [dot(d, ds, "nn", low) for d, ds in zip(cut_heads(delta, heads), dstates, strict=True)]
    yield
    read, dk = jnp.concatenate(read, axis=1), x.leaving * jnp.concatenate(write, axis=1)
    across = cut_heads(x.across, heads)
    kept = [
        a * jnp.sum(s * ds, axis=0, keepdims=True)
        for a, s, ds in zip(across, states, dstates, strict=True)
    ]
    return ThroughState(
        do=do,
        delta=delta,
        dr=dr,
        dq=x.entering * read[:chunk],
        db=x.entering * read[chunk:],
        dk=dk,
        dlog=jnp.sum(x.k * dk, axis=0, keepdims=True) + jnp.concatenate(kept, axis=1),
        dstates=[a * ds + part for a, ds, part in zip(across, dstates, new, strict=True)],
    )


def through_scores(x: Chunk, found: ThroughState, scale: float) -> Step[Gradients]:
    """The rest of the gradients."""
    chunk, heads = x.q.shape[0], x.heads
    do = found.do.astype(jnp.float32)
    dscores = yield from _of_scores(x, do, found)
    # Of pairs alone: those of two segments, the diagonal, and those above it, go.
    pairs = (x.level >= 0) & (x.level < len(x.decays))
    dscores = jnp.where(jnp.concatenate([pairs, pairs], axis=0), dscores, 0.0)
    turned = [_parts(d, x.dtype) for d in _stacked(dscores.T, heads)]  # [C, 2*C] each
    dscores = _parts(dscores, x.dtype)
    level = x.level[:, :chunk].T
    level = jnp.concatenate([level, level], axis=1)
    yield
    dq, db, dk = found.dq, found.db, found.dk
    for n in range(len(x.decays)):
        dq, db, dk = yield from _through_size(x, n, dscores, turned, level, dq, db, dk)
    dlog = x.q * dq + x.b * db - x.k * dk
    sums = jnp.concatenate(_parts(dlog, x.dtype), axis=0)
    sums = dot(x.later, sums, "nn", x.dtype)
    yield
    # P has a diagonal; no decay is in it.
    diagonal = of_each(do, found.delta, lambda a, b: jnp.sum(a * b, 1, keepdims=True), heads)
    key, value = x.q.shape[1] // heads, x.v.shape[1] // heads
    diagonal = along_lanes(diagonal, key)
    dbeta = [
        jnp.sum(v * r, axis=1, keepdims=True) - jnp.sum(k * b, axis=1, keepdims=True)
        for v, r, k, b in zip(*(cut_heads(z, heads) for z in (x.v, found.dr, x.k, db)), strict=True)
    ]
    return Gradients(
        q=scale * (dq + diagonal * x.k),
        k=dk + diagonal * x.q - along_lanes(x.beta, key) * db,
        v=along_lanes(x.beta, value) * found.dr,
        g=found.dlog + sums,
        beta=jnp.concatenate(dbeta, axis=1),
    )


def _parts(x: Array, dtype) -> list[Array]:
    """Factors of products that keep float32's precision, or 16 bits."""
    return [x] if dtype == jnp.float32 else list(halves(x))


def _stacked(x: Array, count: int) -> list[Array]:
    """The parts of `count` that lie one above the other."""
    rows = x.shape[0] // count
    return [x[n * rows : (n + 1) * rows] for n in range(count)]


def _of_scores(x: Chunk, do: Array, found: ThroughState) -> Step[Array]:
    """Gradients of P, and below it of -L; of all pairs."""
    both = jnp.concatenate([do, found.dr], axis=0)
    if x.dtype == jnp.float32:
        made = dot(both, spread(found.delta, x.heads), "nt")
        yield
        return made
    left, right = halves(both), halves(found.delta)
    long = dot(jnp.concatenate(left, axis=0), spread(right.high, x.heads), "nt", x.dtype)
    short = dot(left.high, spread(right.low, x.heads), "nt", x.dtype)
    yield
    return long[: both.shape[0]] + (long[both.shape[0] :] + short)


def _through_size(
    x: Chunk,
    n: int,
    dscores: list[Array],
    turned: list[list[Array]],
    level: Array,
    dq: Array,
    db: Array,
    dk: Array,
) -> Step[tuple[Array, Array, Array]]:
    """dq, db and dk with what comes through the pairs of size 2**n.

    `dscores` are the parts of the gradients of scores, `turned` those of each head, turned; `level`
    is of these.
    """
    size, tall, count = 1 << n, is_tall(x, n), len(dscores)
    down, decay, own = rows(x, n), x.decays[n], x.level
    if tall:
        level, turned = first(level, size), [[first(part, size) for part in d] for d in turned]
        own, dscores = second(own, size), [second(part, size) for part in dscores]
        down = [join(jnp.zeros_like(part), part, size) for part in down]
    down = cut_heads(jnp.concatenate(down, axis=0).astype(x.dtype), x.heads)
    to_column = [
        dot(_masked(d, level == n, 0), part, "nn", x.dtype)
        for d, part in zip(turned, down, strict=True)
    ]
    # Parts are added up by the MXU here, which can take twice as many lanes as a pack has.
    at = jnp.concatenate([own, own], axis=0) == n
    up = jnp.concatenate([all_columns(x, n)] * count, axis=0)
    to_rows = dot(_masked(dscores, at, 1), up, "nn", x.dtype)
    yield
    to_column = jnp.concatenate([sum(_stacked(part, count)) for part in to_column], axis=1)
    to_q, to_b = _stacked(to_rows, 2)
    if not tall:
        return (
            dq + decay * to_q,
            db + decay * to_b,
            dk + (to_column if n == 0 else decay * to_column),
        )
    dq, db = (
        join(first(old, size), second(old, size) + decay[1] * new, size)
        for old, new in ((dq, to_q), (db, to_b))
    )
    return dq, db, join(first(dk, size) + decay[0] * to_column, second(dk, size), size)


def _masked(parts: list[Array], at: Array, axis: int) -> Array:
    """The parts side by side, zero elsewhere than said."""
    return jnp.concatenate([jnp.where(at, part, jnp.zeros_like(part)) for part in parts], axis)
