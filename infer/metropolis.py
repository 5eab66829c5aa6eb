"""Metropolis-Hastings chains over whole responses, with ``p ** alpha`` as their exact target.

A step cuts a response somewhere, draws a new suffix from the proposal, and takes it or not, so that
detailed balance holds exactly. Every response fills a fixed number of slots: what stands after its
stop token is padding, which both laws give probability 1. Blocks lengthen the text: the target of
block ``k`` is over the first ``k * block`` slots.

Source: arXiv 2510.14901, algorithm 1; entropy cuts from arXiv 2605.30327.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from ..sharding import Params, constrain
from .cache import CacheLayout
from .loop import RUNNING, STOPPED, DecodeState, run
from .next_token import next_token_step, prefill, row_keys
from .policy import Temperature
from .records import Entropy, LogProb, ProposalLogProb
from .rewind import Snapshots, reread, rewind

CUTS = ("padded", "grid", "live", "entropy")
REUSE = ("shadow", "reread")
# Every live slot may be cut, however certain the model is there.
_ENTROPY_FLOOR = 1e-3
# What a step folds into its key; token keys fold a position, which is never so large.
_ACCEPT, _CUT = np.uint32(2**32 - 1), np.uint32(2**32 - 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chains:
    """One chain a row.

    Attributes:
        state: the responses, with what was recorded of them, and their caches.
        snapshots: of the caches' recurrent part.
    """

    state: DecodeState
    snapshots: Snapshots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What a block's steps did: the arrays are ``[steps, C]`` but ``extended``, which is ``[C]``.

    Attributes:
        accepted: proposals taken; one that changes nothing is.
        moved: proposals taken that drew at least one token.
        log_ratio: the logarithm of the acceptance ratio; 0 where nothing was drawn.
        logprob: log p of the responses after each step.
        decoded: tokens drawn by each proposal.
        extended: tokens drawn to lengthen the text.
    """

    accepted: Any
    moved: Any
    log_ratio: Any
    logprob: Any
    decoded: Any
    extended: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Metropolis:
    """The compiled chains of one model structure. Keep it: a new one compiles again.

    Attributes:
        graphdef: the model's structure.
        slots: tokens that a response may have.
        block: slots by which the text grows.
        steps: Metropolis-Hastings steps in every block.
        cut: how a step chooses where to cut: ``"padded"``, uniformly over all slots so far (a cut
            after the end changes nothing); ``"grid"``, uniformly over every ``stride``-th of them;
            ``"live"``, uniformly over the response's own tokens; ``"entropy"``, in proportion to
            1e-3 + the model's entropy there. The last two are corrected for by their reversal.
        shared: all chains cut at the same slot (``"padded"`` and ``"grid"``), which decodes least.
        reuse: ``"shadow"`` keeps the cache beside the proposal's (twice the memory); ``"reread"``
            lets the proposal write it over, and after a rejection reads the old suffix again.
        stride: slots between two snapshots of a recurrent state.
    """

    graphdef: nnx.GraphDef
    slots: int
    block: int
    steps: int
    cut: str = "padded"
    shared: bool = True
    reuse: str = "shadow"
    stride: int = 192

    @property
    def num_blocks(self) -> int:
        """Blocks until all slots are there."""
        return -(-self.slots // self.block)

    @functools.cached_property
    def start(self):
        """Jitted ``(params, prompts [B, P], lengths, rows, seeds, samples, *, capacity)``.

        Returns the chains: one for each of ``rows``, forked from that prompt.
        """

        def run_start(params, prompts, lengths, rows, seeds, samples, *, capacity):
            model = nnx.merge(self.graphdef, params)
            layout = CacheLayout.of(model, capacity)
            state = prefill(
                model,
                prompts,
                lengths,
                lengths,
                row_keys(jnp.zeros_like(lengths), lengths),
                capacity=capacity,
                records=self._records,
            ).take(layout, rows)
            keys = constrain(row_keys(seeds, samples), "batch")
            state = dataclasses.replace(state, key=keys)
            snapshots = Snapshots.begin(layout, state.cache, self.slots, self.stride)
            return Chains(state, snapshots)

        return jax.jit(run_start, static_argnames="capacity")

    @functools.cached_property
    def run_block(self):
        """Jitted ``(params, chains, index, alpha, tau, stop_tokens, cut_seed) -> (chains, Trace)``.

        ``index`` counts blocks from 0 and is traced, as all numbers are: one compilation serves
        all blocks. ``cut_seed`` is that of shared cuts. The chains are donated.
        """
        return jax.jit(self._run_block, donate_argnums=1)

    @property
    def _records(self):
        records = (LogProb(), ProposalLogProb())
        return (*records, Entropy()) if self.cut == "entropy" else records

    def _run_block(
        self,
        params: Params,
        chains: Chains,
        index: Int[Array, ""],
        alpha: Float[Array, ""],
        tau: Float[Array, ""],
        stop_tokens: Int[Array, "C S"],
        cut_seed: Int[Array, ""] | int = 0,
    ) -> tuple[Chains, Trace]:
        model = nnx.merge(self.graphdef, params)
        layout = CacheLayout.of(model, chains.state.tokens.shape[1])
        step = next_token_step(model, Temperature(tau), layout, stop_tokens, self._records)
        end = jnp.minimum((index + 1) * self.block, self.slots)
        base = chains.state.key
        first = index * (self.steps + 1)

        def decode(chains: Chains, number) -> Chains:
            keys = jax.vmap(jax.random.fold_in, (0, None))(base, number)
            state = dataclasses.replace(chains.state, key=keys)
            return self._decode(layout, step, Chains(state, chains.snapshots), end)

        before = chains.state.length
        chains = decode(chains, first)
        extended = chains.state.length - before

        def one(chains: Chains, number):
            state = chains.state
            slot = self._cut(base, cut_seed, state, number, end)
            live = state.length - state.prompt_length
            rows = slot < live
            propose = functools.partial(
                self._propose, model, layout, decode, chains, slot, rows, number, base, alpha
            )
            still = jnp.zeros_like(live)

            def nothing():
                return chains, ~rows, jnp.zeros_like(still, jnp.float32), still

            chains, accepted, log_ratio, decoded = jax.lax.cond(jnp.any(rows), propose, nothing)
            logprob = jnp.sum(chains.state.records["logprob"], axis=1)
            return chains, (accepted, accepted & rows, log_ratio, logprob, decoded)

        numbers = first + 1 + jnp.arange(self.steps)
        chains, trace = jax.lax.scan(one, chains, numbers)
        chains = dataclasses.replace(chains, state=dataclasses.replace(chains.state, key=base))
        return chains, Trace(*trace, extended)

    def _propose(self, model, layout, decode, chains, slot, rows, number, base, alpha):
        """One proposal, taken or not: ``(chains, accepted, log_ratio, decoded)``."""
        old = chains.state
        cache = rewind(model, layout, chains.snapshots, old, slot, rows, on_grid=self.cut == "grid")
        start = old.prompt_length + slot
        cut = dataclasses.replace(_shortened(old, start, rows), cache=cache)
        new = decode(Chains(cut, chains.snapshots), number)
        decoded = jnp.where(rows, new.state.length - start, 0)

        change = {
            name: new.state.records[name] - old.records[name]
            for name in ("logprob", "proposal_logprob")
        }
        # Differences slot by slot: what stands before the cut is the same and cancels exactly.
        log_ratio = jnp.sum(alpha * change["logprob"] - change["proposal_logprob"], axis=1)
        log_ratio = jnp.where(rows, log_ratio + self._reversal(old, new.state), 0)
        keys = jax.vmap(_step_key, (0, None, None))(base, number, _ACCEPT)
        accepted = jnp.log(jax.vmap(jax.random.uniform)(keys)) < log_ratio
        accepted = accepted | ~rows
        chains = self._settle(model, layout, chains, new, slot, rows, accepted)
        return chains, accepted, log_ratio, decoded

    def _settle(self, model, layout, chains, new, slot, rows, accepted) -> Chains:
        """The chains after accepting and rejecting."""
        old, rejected = chains.state, rows & ~accepted
        if self.reuse == "shadow":
            return Chains(
                new.state.where(layout, accepted, old),
                new.snapshots.where(layout, accepted, chains.snapshots),
            )
        kept = dataclasses.replace(old, cache=new.state.cache)
        state = new.state.where(layout, accepted, kept)
        cache, snapshots = jax.lax.cond(
            jnp.any(rejected),
            lambda: reread(model, layout, new.snapshots, state, slot, rejected),
            lambda: (state.cache, new.snapshots),
        )
        return Chains(dataclasses.replace(state, cache=cache), snapshots)

    def _decode(self, layout, step, chains: Chains, end: Int[Array, ""]) -> Chains:
        """Draw up to slot ``end``, keeping snapshots on the way."""
        state, snapshots = chains.state, chains.snapshots
        if not layout.is_recurrent:
            return Chains(run(step, state.with_limit(state.prompt_length + end)), snapshots)
        begun = state.length - state.prompt_length
        rows = state.reason != STOPPED

        def piece(i, carry):
            state, snapshots = carry
            stop = jnp.minimum((i + 1) * self.stride, end)
            state = run(step, state.with_limit(state.prompt_length + stop))
            passed = rows & (begun < stop) & ((i + 1) * self.stride <= end)
            return state, snapshots.write(layout, i + 1, passed, state.cache)

        first = jnp.min(jnp.where(rows, begun, end)) // self.stride
        last = -(-end // self.stride)
        return Chains(*jax.lax.fori_loop(first, last, piece, (state, snapshots)))

    def _cut(self, base, cut_seed, state: DecodeState, number, end) -> Int[Array, "C"]:
        """The slot from which each chain draws anew."""
        if self.cut in ("padded", "grid"):
            unit = self.stride if self.cut == "grid" else 1
            count = -(-end // unit)
            if self.shared:
                # Of the step alone: the cut must not depend on the chains, nor on which they are.
                key = _step_key(jax.random.key(cut_seed), number, _CUT)
                slot = unit * jax.random.randint(key, (), 0, count, jnp.int32)
                return jnp.zeros_like(state.length) + slot
            draw = functools.partial(jax.random.randint, shape=(), minval=0, maxval=count)
            return unit * jax.vmap(draw)(self._cut_keys(base, number))
        weights = self._weights(state)
        return jax.vmap(jax.random.categorical)(self._cut_keys(base, number), jnp.log(weights)) - (
            state.prompt_length
        )

    def _cut_keys(self, base, number) -> PRNGKeyArray:
        return jax.vmap(_step_key, (0, None, None))(base, number, _CUT)

    def _weights(self, state: DecodeState) -> Float[Array, "C T"]:
        """Of cutting at each position: 0 outside the response's own tokens."""
        places = jnp.arange(state.tokens.shape[1])
        live = (places >= state.prompt_length[:, None]) & (places < state.length[:, None])
        weight = 1.0
        if self.cut == "entropy":
            weight = _ENTROPY_FLOOR + state.records["entropy"]
        return jnp.where(live, weight, 0.0)

    def _reversal(self, old: DecodeState, new: DecodeState) -> Float[Array, "C"] | float:
        """What the law of the cut adds to the log ratio: log q(cut | new) - log q(cut | old).

        The weight at the cut itself is of the shared prefix and cancels.
        """
        if self.cut in ("padded", "grid"):
            return 0.0
        total = [jnp.log(jnp.sum(self._weights(state), axis=1)) for state in (old, new)]
        return total[0] - total[1]


def _step_key(base: PRNGKeyArray, number: Int[Array, ""], purpose: np.uint32) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(base, number), purpose)


def _shortened(state: DecodeState, length: Int[Array, "C"], rows: Bool[Array, "C"]) -> DecodeState:
    """The text of ``rows`` up to ``length``, running again."""
    keep = (jnp.arange(state.tokens.shape[1]) < length[:, None]) | ~rows[:, None]
    return dataclasses.replace(
        state,
        tokens=jnp.where(keep, state.tokens, 0),
        length=jnp.where(rows, length, state.length),
        reason=jnp.where(rows, RUNNING, state.reason).astype(jnp.int32),
        records={name: jnp.where(keep, x, 0) for name, x in state.records.items()},
    )
