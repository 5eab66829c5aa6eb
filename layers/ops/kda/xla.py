"""KDA in chunks, by XLA: matrix products inside a chunk, a short scan from chunk to chunk.

One chunk of C tokens, with alpha = exp(g), rows q (scaled), b = beta*k and columns k:

    P[r, i] = sum_c q[r] k[i] (alpha[i+1] ... alpha[r])    i <= r      reads
    L[r, i] = sum_c b[r] k[i] (alpha[i+1] ... alpha[r])    i <  r      overlaps of writes
    A       = (I + L)^-1
    U, W    = A (beta*v), A (b * alpha[1] ... alpha[r])
    Delta   = U - W S                                      what each token writes
    O       = (q * alpha[1] ... alpha[r]) S + P Delta
    S'      = (alpha[1] ... alpha[C]) S + (k * alpha[r+1] ... alpha[C])^T Delta

with S the state that enters the chunk. The decay between two tokens is never a quotient of
cumulative products: blocks are doubled, 4, 8, ... C rows, and a decay across a block boundary is
(boundary to row) * (column to boundary), each a product of alphas and so within [0, 1]. Nothing can
overflow however strong the decay, products that underflow are right to be zero, and no difference
of large cumulative sums is taken. The same doubling inverts I + L, which stays accurate when the
powers of L would not.

Source: Kimi Linear report, section 3. The backward pass is the transpose of the above, with
d(log alpha[t]) = sum over rows r >= t of (row * d row - column * d column).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...segments import segment_index
from ..precision import full

# Rows whose pairwise decays are multiplied out elementwise; larger blocks are matrix products.
_BASE = 4
# Chunks that are worked on at once. More would not run faster and would not fit into caches.
_BLOCK_CHUNKS = 32
# Inverse and score gradients are always float32; other products too unless the inputs are 16-bit.
_EXACT = jax.lax.Precision.HIGHEST


class _Level(NamedTuple):
    """Decays around the boundary in the middle of each block of 2*size rows, [..., n, size, K]."""

    size: int
    row: Array  # from the boundary to each row of the second half, that row included
    col: Array  # from after each row of the first half to the boundary
    row_total: Array  # [..., n, 1, K]: across the first half
    col_total: Array  # [..., n, 1, K]: across the second half


def _dot(equation: str, x: Array, y: Array, precision=_EXACT) -> Array:
    return jnp.einsum(equation, x, y, precision=precision)


def _halves(x: Array, size: int) -> tuple[Array, Array]:
    """[..., C, D] -> first and second halves of its blocks of 2*size rows, [..., n, size, D]."""
    x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _join(first: Array, second: Array) -> Array:
    """Inverse of `_halves`."""
    x = jnp.stack([first, second], axis=-3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def _decays(alpha: Array) -> tuple[list[_Level], tuple[Array, Array], tuple[Array, Array]]:
    """Decays at every doubling from `_BASE` to the chunk.

    Returns the levels, and (from block start to row inclusive, from after row to block end) for
    blocks of `_BASE` rows and for the whole chunk.
    """
    row, col = alpha, jnp.ones_like(alpha)
    levels, base, size = [], (row, col), 1
    while size < alpha.shape[-2]:
        row_1, row_2 = _halves(row, size)
        col_1, _ = _halves(col, size)
        total_1, total_2 = row_1[..., -1:, :], row_2[..., -1:, :]
        if size == _BASE:
            base = row, col
        if size >= _BASE:
            levels.append(_Level(size, row_2, col_1, total_1, total_2))
        one = jnp.ones_like(total_1)
        widen = (*row_1.shape[:-2], 2, size, row.shape[-1])
        row_factor = jnp.stack([one, total_1], axis=-3)
        col_factor = jnp.stack([total_2, one], axis=-3)
        row = (row.reshape(widen) * row_factor).reshape(alpha.shape)
        col = (col.reshape(widen) * col_factor).reshape(alpha.shape)
        size *= 2
    return levels, base, (row, col)


def _base_rows(x: Array) -> list[Array]:
    """[..., C, D] -> row 0, row 1, ... of every block of `_BASE` rows, each [..., n, D]."""
    x = x.reshape(*x.shape[:-2], -1, _BASE, x.shape[-1])
    return [x[..., r, :] for r in range(_BASE)]


def _base_pairs(alpha: list[Array], index: list[Array] | None):
    """Yields (r, i, decay from i to r) for i < r inside a base block; zero across segments."""
    for i in range(_BASE):
        decay = None
        for r in range(i + 1, _BASE):
            decay = alpha[r] if decay is None else decay * alpha[r]
            same = 1.0 if index is None else (index[r] == index[i]).astype(decay.dtype)
            yield r, i, decay * same


def _same_segment(index: Array, size: int) -> Array:
    """[..., n, 1, size, size]: do a second-half row and a first-half column share a segment?"""
    first, second = _halves(index, size)
    return (second == jnp.swapaxes(first, -1, -2))[..., None, :, :]


def _row_block(q: Array, b: Array, level: _Level) -> Array:
    """Second-half rows of q above those of b, decayed from the boundary: [..., n, 2*size, K]."""
    rows = [_halves(x, level.size)[1] * level.row for x in (q, b)]
    return jnp.concatenate(rows, axis=-2)


def _corner(top: Array, corner: Array, bottom: Array) -> Array:
    """[[top, 0], [corner, bottom]] over the last two axes."""
    upper = jnp.concatenate([top, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, bottom], axis=-1)], axis=-2)


def _grow(blocks: Array, corner: Array) -> Array:
    """[..., 2n, s, s] diagonal blocks and their corners [..., n, s, s] -> [..., n, 2s, 2s]."""
    pairs = blocks.reshape(*blocks.shape[:-3], -1, 2, *blocks.shape[-2:])
    return _corner(pairs[..., 0, :, :], corner, pairs[..., 1, :, :])


def _small_dot(x: Array, y: Array) -> Array:
    """x @ y; elementwise for blocks so small that a batched product is all overhead."""
    if x.shape[-1] > _BASE:
        return _dot("...ij,...jk->...ik", x, y)
    return jnp.sum(x[..., :, :, None] * y[..., None, :, :], axis=-2)


def _base_matrix(entries: dict[tuple[int, int], Array]) -> Array:
    """Entries [..., n] by (row, column) -> [..., n, _BASE, _BASE], zero elsewhere."""
    zero = jnp.zeros_like(next(iter(entries.values())))
    cells = [entries.get((r, i), zero) for r in range(_BASE) for i in range(_BASE)]
    return jnp.stack(cells, axis=-1).reshape(*zero.shape, _BASE, _BASE)


def _scores(q, b, k, alpha, index, levels, precision) -> tuple[Array, Array]:
    """P and A = (I + L)^-1, both [..., C, C]."""
    q_rows, b_rows, k_rows = _base_rows(q), _base_rows(b), _base_rows(k)
    index_rows = None if index is None else _base_rows(index)
    read = {(r, r): jnp.sum(q_rows[r] * k_rows[r], axis=-1) for r in range(_BASE)}
    overlap = {}
    for r, i, decay in _base_pairs(_base_rows(alpha), index_rows):
        column = decay * k_rows[i]
        read[r, i] = jnp.sum(q_rows[r] * column, axis=-1)
        overlap[r, i] = jnp.sum(b_rows[r] * column, axis=-1)
    scores, overlaps = _base_matrix(read), _base_matrix(overlap)
    # L is nilpotent: (I + L)^-1 = (I - L)(I + L^2) exactly, for four rows.
    identity = jnp.eye(_BASE, dtype=overlaps.dtype)
    inverse = _small_dot(identity - overlaps, identity + _small_dot(overlaps, overlaps))
    for level in levels:
        size = level.size
        columns = _halves(k, size)[0] * level.col
        block = _dot("...rc,...ic->...ri", _row_block(q, b, level), columns, precision)
        block = block.reshape(*block.shape[:-2], 2, size, size)
        if index is not None:
            block = jnp.where(_same_segment(index, size), block, 0.0)
        scores = _grow(scores, block[..., 0, :, :])
        pairs = inverse.reshape(*inverse.shape[:-3], -1, 2, size, size)
        corner = _small_dot(pairs[..., 1, :, :], block[..., 1, :, :])
        corner = _small_dot(corner, pairs[..., 0, :, :])
        inverse = _grow(inverse, -corner)
    return scores[..., 0, :, :], inverse[..., 0, :, :]


def _scores_transposed(x: "_Chunks", do, dr, delta, dq, db, dk):
    """Gradients of q, b and k through P, L and through the chunk's own decays.

    dP = tril(do delta^T) and dL = -stril(dr delta^T) are formed block by block. dq, db come in as
    gradients of the rows decayed from the start of the chunk, dk of the columns decayed to its end.
    Returns the gradients of q, of b, and of k as a column, all without the diagonal of P.
    """
    q, b, k, alpha, index, levels, base = x.q, x.b, x.k, x.alpha, x.index, x.levels, x.base
    for level in reversed(levels):
        size = level.size
        rows, columns = _row_block(q, b, level), _halves(k, size)[0] * level.col
        outer = jnp.concatenate([_halves(do, size)[1], -_halves(dr, size)[1]], axis=-2)
        block = _dot("...rv,...iv->...ri", outer, _halves(delta, size)[0])
        if index is not None:
            both = block.reshape(*block.shape[:-2], 2, size, size)
            block = jnp.where(_same_segment(index, size), both, 0.0).reshape(block.shape)
        drows = _dot("...ri,...ic->...rc", block, columns)
        # The barrier keeps the transpose out of the product: over a batch of small blocks XLA's CPU
        # takes up to ten times longer for X^T Y than for a copy of X^T and X Y.
        block = jax.lax.optimization_barrier(jnp.swapaxes(block, -1, -2))
        dcolumns = _dot("...ir,...rc->...ic", block, rows)
        first, second = _halves(dq, size)
        dq = _join(first, second * level.row_total + drows[..., :size, :])
        first, second = _halves(db, size)
        db = _join(first, second * level.row_total + drows[..., size:, :])
        first, second = _halves(dk, size)
        dk = _join(first * level.col_total + dcolumns, second)
    dq, db, dk = _base_rows(dq * base[0]), _base_rows(db * base[0]), _base_rows(dk * base[1])
    q, b, k, do, dr, delta = map(_base_rows, (q, b, k, do, dr, delta))
    index_rows = None if index is None else _base_rows(index)
    for r, i, decay in _base_pairs(_base_rows(alpha), index_rows):
        dread = jnp.sum(do[r] * delta[i], axis=-1, keepdims=True)
        doverlap = -jnp.sum(dr[r] * delta[i], axis=-1, keepdims=True)
        column = decay * k[i]
        dq[r] += dread * column
        db[r] += doverlap * column
        dk[i] += decay * (dread * q[r] + doverlap * b[r])
    return tuple(jnp.stack(rows, axis=-2).reshape(alpha.shape) for rows in (dq, db, dk))


def _to_chunks(x: Array, chunk: int, dtype) -> Array:
    """[B, T, H, D] -> [N, B, H, C, D], the layout in which every product is contiguous."""
    batch, length, *rest = x.shape
    x = x.astype(dtype).reshape(batch, length // chunk, chunk, *rest)
    return x.transpose(1, 0, 3, 2, 4)


def _keep(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0.0)


def _from_chunks(x: Array) -> Array:
    """[N, B, H, C, D] -> [B, T, H, D]."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


class _Chunks(NamedTuple):
    """What both passes need of the inputs, [N, B, H, C, ...]; cheap, so never saved."""

    q: Array
    k: Array
    v: Array
    beta: Array
    alpha: Array
    b: Array
    index: Array | None
    levels: list[_Level]
    base: tuple[Array, Array]
    running: Array | None  # [N, B, 1, C, 1] rows of the segment that entered the chunk
    final: Array | None  # [N, B, 1, C, 1] rows of the segment that leaves it
    entering: Array  # decay of the entering state up to each row; zero past its segment
    leaving: Array  # decay of each row's write to the end; zero before the last segment
    across: Array  # [N, B, H, K] decay of the entering state across the chunk


def _prepare(q, k, v, g, beta, numbers, scale, chunk) -> _Chunks:
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    q, k, v, g = (_to_chunks(x, chunk, dtype) for x in (q, k, v, g))
    beta = _to_chunks(beta[..., None], chunk, dtype)
    q, alpha = q * scale, jnp.exp(g)
    levels, base, (entering, leaving) = _decays(alpha)
    across, index, running, final = entering[..., -1, :], None, None, None
    if numbers is not None:
        index, before = (_to_chunks(x[..., None, None], chunk, jnp.int32) for x in numbers)
        before, last = before[..., :1, :], index[..., -1:, :]
        running, final = index == before, index == last
        across = _keep((before == last)[..., 0, :], across)
    entering, leaving = _keep(running, entering), _keep(final, leaving)
    b = beta * k
    return _Chunks(
        q, k, v, beta, alpha, b, index, levels, base, running, final, entering, leaving, across
    )


def _forward(q, k, v, g, beta, initial_state, numbers, scale, chunk):
    # Of float32 factors: what 16-bit inputs are made of, the hardware's fast path carries.
    precision = full(q.dtype)
    dot = functools.partial(_dot, precision=precision)
    x = _prepare(q, k, v, g, beta, numbers, scale, chunk)
    scores, inverse = _scores(x.q, x.b, x.k, x.alpha, x.index, x.levels, precision)
    u = dot("...ri,...iv->...rv", inverse, x.beta * x.v)
    w = dot("...ri,...ik->...rk", inverse, x.b * x.entering)
    k_end = x.k * x.leaving

    def step(state, chunk):
        u, w, k_end, across = chunk
        delta = u - dot("...rk,...kv->...rv", w, state)
        after = across[..., None] * state + dot("...rk,...rv->...kv", k_end, delta)
        return after, state

    state, states = jax.lax.scan(step, initial_state, (u, w, k_end, x.across))
    delta = u - dot("...rk,...kv->...rv", w, states)
    o = dot("...rk,...kv->...rv", x.q * x.entering, states)
    o = o + dot("...ri,...iv->...rv", scores, delta)
    return _from_chunks(o).astype(v.dtype), state, (scores, inverse, states, delta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _kda(q, k, v, g, beta, initial_state, numbers, scale, chunk):
    return _forward(q, k, v, g, beta, initial_state, numbers, scale, chunk)[:2]


def _kda_forward(q, k, v, g, beta, initial_state, numbers, scale, chunk):
    o, state, saved = _forward(q, k, v, g, beta, initial_state, numbers, scale, chunk)
    return (o, state), (q, k, v, g, beta, numbers, saved)


def _kda_backward(scale, chunk, residuals, cotangents):
    q_in, k_in, v_in, g_in, beta_in, numbers, (scores, inverse, states, delta) = residuals
    do, dstate = cotangents
    dot = functools.partial(_dot, precision=full(q_in.dtype))
    x = _prepare(q_in, k_in, v_in, g_in, beta_in, numbers, scale, chunk)
    do = _to_chunks(do, chunk, x.alpha.dtype)
    k_end = x.k * x.leaving
    w = dot("...ri,...ik->...rk", inverse, x.b * x.entering)
    ddelta = dot("...ri,...rv->...iv", scores, do)
    dread = dot("...rk,...rv->...kv", x.q * x.entering, do)
    dread = dread - dot("...rk,...rv->...kv", w, ddelta)

    def step(dstate, chunk):
        dread, w, k_end, across = chunk
        written = dot("...rk,...kv->...rv", k_end, dstate)
        before = dread + across[..., None] * dstate - dot("...rk,...rv->...kv", w, written)
        return before, dstate

    dinitial, dstates = jax.lax.scan(step, dstate, (dread, w, k_end, x.across), reverse=True)
    ddelta = ddelta + dot("...rk,...kv->...rv", k_end, dstates)
    dr = _dot("...ri,...rv->...iv", inverse, ddelta)
    # Through the states, seen from the start of the chunk (rows) and from its end (columns).
    dq = _keep(x.running, dot("...rv,...kv->...rk", do, states))
    db = -_keep(x.running, dot("...rv,...kv->...rk", dr, states))
    dk = _keep(x.final, dot("...rv,...kv->...rk", delta, dstates))
    dacross = jnp.sum(k_end * dk, axis=-2) + x.across * jnp.sum(states * dstates, axis=-1)
    dq, db, dk = _scores_transposed(x, do, dr, delta, dq, db, dk)
    dlog = x.q * dq + x.b * db - x.k * dk
    dg = jax.lax.associative_scan(jnp.add, dlog, reverse=True, axis=dlog.ndim - 2)
    dg = dg + dacross[..., None, :]
    diagonal = jnp.sum(do * delta, axis=-1, keepdims=True)  # of P: no decay in it
    dq = scale * (dq + diagonal * x.k)
    dk = dk + diagonal * x.q + x.beta * db
    dbeta = jnp.sum(x.k * db, axis=-1, keepdims=True) + jnp.sum(x.v * dr, axis=-1, keepdims=True)
    inputs = (q_in, k_in, v_in, g_in, beta_in)
    grads = (dq, dk, x.beta * dr, dg, dbeta)
    grads = [
        _from_chunks(d).reshape(y.shape).astype(y.dtype) for d, y in zip(grads, inputs, strict=True)
    ]
    return (*grads, dinitial, None)


_kda.defvjp(_kda_forward, _kda_backward)


def kda_xla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Chunkwise KDA with an analytic backward pass, one q/k head per value head.

    T must be a multiple of chunk_size, a power of two >= 4; padding tokens carry k=v=beta=g=0.
    Rows longer than `_BLOCK_CHUNKS` chunks are scanned block by block, so that temporaries stay
    those of one block. Saves for the backward pass, besides the inputs, 2*C + V + K*V/C floats a
    token and head.
    """
    batch, length = q.shape[:2]
    chunks = length // chunk_size
    blocks = -(-chunks // _BLOCK_CHUNKS)
    block = -(-chunks // blocks) * chunk_size  # even blocks: fewer than `blocks` chunks of padding
    padding = blocks * block - length

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) if padding else x

    tokens, numbers = tuple(map(pad, (q, k, v, g, beta))), None
    if segment_ids is not None:
        running = segment_index(pad(segment_ids))
        # A row starts inside its segment 0.
        numbers = running, jnp.pad(running[:, :-1], ((0, 0), (1, 0)))
    if blocks == 1:
        return _kda(*tokens, initial_state, numbers, scale, chunk_size)

    def split(x):
        return jnp.moveaxis(x.reshape(batch, blocks, block, *x.shape[2:]), 1, 0)

    def step(state, part):
        tokens, numbers = part
        o, state = _kda(*tokens, state, numbers, scale, chunk_size)
        return state, o

    state, o = jax.lax.scan(step, initial_state, jax.tree.map(split, (tokens, numbers)))
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(batch, -1, *o.shape[3:])[:, :length], state
