"""A chunk for every row, by as many draws of the model as its temperature takes.

Draw ``j`` of a row is a function of the row's key and ``j``, and a row reads its draws in order:
how many are made at once, and how long its neighbours take, changes nothing. Rows that are through
wait for the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ...sharding import constrain, kernel_map
from ..policy import Policy, policy

# Draws of the model: the chunks ``[B, M, K]`` of keys ``[B, M]``.
Base = Callable[[PRNGKeyArray], Int[Array, "B M K"]]
_ROW = ("batch",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What :func:`draw_chunks` drew.

    Attributes:
        chunk: ``[B, K]``.
        draws: ``[B]``, draws of the model that the row looked at.
        exhausted: ``[B]``, whether it had to stop before it was through.
    """

    chunk: Any
    draws: Any
    exhausted: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Draws as they come.

    Attributes:
        chunk: ``[B, M, K]``.
        valid: ``[B, M]``, whether a draw begins as the row must.
        key: ``[B, M]``, one a draw, for what is random beside it.
    """

    chunk: Any
    valid: Any
    key: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExactState:
    """Where each row is in the exact algorithm.

    Attributes:
        chunk: ``[B, K]``, the candidate.
        count: ``[B]``, draws of this attempt at agreement.
        equal: ``[B]``, whether all of these are the candidate.
        tries: ``[B]``, of the Bernoulli factory, from 1 on; 0 is still before it.
        draws: ``[B]``, looked at.
        through: ``[B]``.
    """

    chunk: Any
    count: Any
    equal: Any
    tries: Any
    draws: Any
    through: Any


class ChunkPolicy(Policy):
    """How whole chunks are drawn, of one prompt or of every row of a batch."""

    needs: ClassVar[frozenset[str]] = frozenset({"chunks"})
    rank: ClassVar[int] = 60


@policy(static=("stop_early", "draws_per_call"))
class ExactRows(ChunkPolicy):
    """:class:`~.temperature.ExactTemperature` of every row.

    Attributes:
        whole, part: ``[B]``, of ``1 / T``: int32 and float32.
        max_draws: ``[B]``.
        stop_early, draws_per_call: see :class:`~.temperature.ExactTemperature`.
    """

    whole: Any
    part: Any
    max_draws: Any
    stop_early: bool = False
    draws_per_call: int = 16

    def start(self, chunk: Int[Array, "B K"], through: Bool[Array, "B"]) -> ExactState:
        """Nothing has been looked at; ``chunk`` is what a row has if it never finds one."""
        zeros = jnp.zeros_like(through, jnp.int32)
        return ExactState(chunk, zeros, ~jnp.zeros_like(through), zeros, zeros, through)

    def push(self, state: ExactState, new: Candidates) -> ExactState:
        """Look at more draws, one after the other."""

        def one(s, now):
            chunk, valid, u = now
            live = ~s.through & (s.draws < self.max_draws)
            use = live & valid
            collecting, first = use & (s.tries == 0), s.count == 0
            kept = jnp.where((collecting & first)[:, None], chunk, s.chunk)
            same = jnp.all(chunk == kept, axis=1)
            # Agreement: as many equal draws as the whole part of 1 / T.
            count = s.count + collecting
            equal = jnp.where(collecting, (first | s.equal) & same, s.equal)
            agreed = collecting & equal & (count >= self.whole)
            failed = collecting & ~equal & ((count >= self.whole) | self.stop_early)
            # The factory shows heads with probability P ** part: heads if the candidate is drawn
            # again; else tails with probability part / i in its i-th try.
            trying = use & (s.tries > 0)
            heads = trying & same
            tails = trying & ~same & (u * s.tries < self.part)
            begin = failed | tails
            tries = jnp.where(agreed, 1, s.tries + (trying & ~same))
            return (
                ExactState(
                    chunk=kept,
                    count=jnp.where(begin, 0, count),
                    equal=equal,
                    tries=jnp.where(begin, 0, tries),
                    draws=s.draws + live,
                    through=s.through | heads | (agreed & (self.part == 0)),
                ),
                None,
            )

        uniform = jax.vmap(jax.vmap(jax.random.uniform))(new.key)
        columns = (new.chunk, new.valid, constrain(uniform, "batch", None))
        moved = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), columns)
        return jax.lax.scan(one, state, moved)[0]

    def result(self, state: ExactState) -> Int[Array, "B K"]:
        """The candidate, if a row is through; else the one it tried last."""
        return state.chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
    """The draws that each row has so far.

    Attributes:
        chunk: ``[B, N, K]``; from ``count`` on they mean nothing.
        gumbel: ``[B, N]``, one a draw.
        count: ``[B]``.
        draws: ``[B]``, looked at.
        through: ``[B]``.
    """

    chunk: Any
    gumbel: Any
    count: Any
    draws: Any
    through: Any


@policy(static=("size", "draws_per_call"))
class BatchRows(ChunkPolicy):
    """:class:`~.temperature.BatchTemperature` of every row.

    Attributes:
        whole: ``[B]``, ``1 / T``.
        needed: ``[B]``, draws to choose among.
        max_draws: ``[B]``.
        size: the largest of ``needed``.
        draws_per_call: see :class:`~.temperature.BatchTemperature`.
    """

    whole: Any
    needed: Any
    max_draws: Any
    size: int
    draws_per_call: int = 64

    def start(self, chunk: Int[Array, "B K"], through: Bool[Array, "B"]) -> BatchState:
        """Nothing has been looked at; ``chunk`` is what a row has if it never finds one."""
        zeros = jnp.zeros_like(through, jnp.int32)
        rows = jnp.broadcast_to(chunk[:, None], (chunk.shape[0], self.size, chunk.shape[1]))
        gumbel = jnp.zeros((chunk.shape[0], self.size), jnp.float32)
        return BatchState(
            constrain(rows, "batch", None, None), constrain(gumbel, "batch", None),
            zeros, zeros, through,
        )  # fmt: skip

    def push(self, state: BatchState, new: Candidates) -> BatchState:
        """Keep the valid ones of these draws, as long as a row needs more."""
        index = state.draws[:, None] + jnp.arange(new.valid.shape[1])
        before = state.count[:, None] + jnp.cumsum(new.valid, axis=1) - new.valid
        looked = (before < self.needed[:, None]) & (index < self.max_draws[:, None])
        looked = looked & ~state.through[:, None]
        slot = jnp.where(looked & new.valid, before, self.size)
        gumbel = constrain(jax.vmap(jax.vmap(jax.random.gumbel))(new.key), "batch", None)
        count = state.count + jnp.sum(looked & new.valid, axis=1, dtype=jnp.int32)
        return BatchState(
            chunk=_put(state.chunk, slot, new.chunk),
            gumbel=_put(state.gumbel, slot, gumbel),
            count=count,
            draws=state.draws + jnp.sum(looked, axis=1, dtype=jnp.int32),
            through=state.through | (count >= self.needed),
        )

    def result(self, state: BatchState) -> Int[Array, "B K"]:
        """A chunk of law ``C(c, n)`` over how often, ``c``, each was drawn."""
        places = jnp.arange(self.size)
        scores = choice_logits(state.chunk, state.count, self.whole) + state.gumbel
        # One draw alone is temperature 1, however many places neighbours need.
        scores = jnp.where((self.whole == 1)[:, None], -places.astype(jnp.float32), scores)
        chosen = places == jnp.argmax(scores, axis=1)[:, None]
        return jnp.sum(jnp.where(chosen[:, :, None], state.chunk, 0), axis=1, dtype=jnp.int32)


def choice_logits(
    chunk: Int[Array, "B N K"], count: Int[Array, "B"], whole: Int[Array, "B"]
) -> Float[Array, "B N"]:
    """Logits of each of the first ``count`` draws to be chosen, float32.

    A chunk drawn ``c`` times gets weight ``C(c, m)`` with ``m`` the smaller of ``whole`` and the
    largest ``c``, which its draws share. ``C(c, m) / c`` is ``(c - 1) ... (c - m + 1)`` over a
    number that all have in common.
    """
    exists = jnp.arange(chunk.shape[1]) < count[:, None]
    equal = jnp.all(chunk[:, :, None] == chunk[:, None, :], axis=-1) & exists[:, None, :]
    often = jnp.where(exists, jnp.sum(equal, axis=2, dtype=jnp.int32), 0)
    level = jnp.minimum(whole, jnp.max(often, axis=1))[:, None]

    def add(i, total):
        factor = jnp.log(jnp.maximum(often - i, 1).astype(jnp.float32))
        return total + jnp.where(i < level, factor, 0.0)

    start = constrain(jnp.zeros(often.shape, jnp.float32), "batch", None)
    total = jax.lax.fori_loop(1, jnp.max(level), add, start)
    return jnp.where(exists & (often >= level), total, -jnp.inf)


def draw_chunks(
    rows: ExactRows | BatchRows,
    base: Base,
    keys: PRNGKeyArray,
    given: Int[Array, "B K"],
    fixed: Bool[Array, "B K"],
    active: Bool[Array, "B"],
) -> Drawn:
    """A chunk for every ``active`` row.

    Args:
        rows: temperatures and budgets.
        base: draws of the model.
        keys: one a row, ``[B]``; draws are a function of them alone.
        given: tokens that a chunk must have where ``fixed``: draws that differ there are looked at
            and dropped, so that the law is the conditional one. An exhausted row gets them anyway.
        fixed: the places.
        active: other rows get a chunk that means nothing, and take no draws.
    """
    keys = constrain(keys, *_ROW)

    def candidates(first, count):
        def of(key, index):
            key = jax.random.fold_in(key, index)
            return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

        indices = first + jnp.arange(count)
        own, beside = jax.vmap(lambda key: jax.vmap(lambda j: of(key, j))(indices))(keys)
        chunk = constrain(base(own), "batch", None, None)
        valid = jnp.all((chunk == given[:, None]) | ~fixed[:, None], axis=2)
        return Candidates(chunk, valid, beside)

    # Most rows are at temperature 1 and through by one draw.
    first = candidates(0, 1)
    state = rows.push(rows.start(first.chunk[:, 0], ~active), first)

    def waits(state):
        return active & ~state.through & (state.draws < rows.max_draws)

    def more(carry):
        return jnp.any(waits(carry[1]))

    def body(carry):
        number, state = carry
        new = candidates(number, rows.draws_per_call)
        return number + rows.draws_per_call, rows.push(state, new)

    _, state = jax.lax.while_loop(more, body, (jnp.int32(1), state))
    chunk = jnp.where(fixed, given, rows.result(state))
    return Drawn(chunk, state.draws, active & ~state.through)


def _put(buffer: Array, slot: Int[Array, "B M"], new: Array) -> Array:
    """``buffer [B, N, ...]`` with ``new [B, M, ...]`` at these slots; those beyond are dropped."""

    def local(buffer, slot, new):
        return buffer.at[jnp.arange(len(buffer))[:, None], slot].set(new, mode="drop")

    axes = ("batch", *(None,) * (buffer.ndim - 1))
    return kernel_map(local, (axes, ("batch", None), axes), axes)(buffer, slot, new)
