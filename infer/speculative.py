"""Speculative decoding: drafts that the model reads in one call, and keeps where it may.

Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv 2211.17192). A
draft ``d`` from ``q`` is accepted with probability ``min(1, p(d) / q(d))``; the first that is not
is replaced by a draw from ``max(p - q, 0)``, and where all are, one more token is drawn from ``p``.
So every token has the law ``p`` of plain decoding, the policy's stages included, whatever the
drafts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .cache import CacheLayout
from .drafts import ACCEPT, Drafter, aside
from .loop import DecodeState
from .next_token import NextToken, commit, context_of, last_token, read
from .policy import Context, Policy, propose
from .records import LogProb, Record


@dataclasses.dataclass(frozen=True)
class Drafted:
    """How many tokens were drafted in the step that began with this one, ``[B]`` int32.

    Drafts past a row's limit do not count. The speculative step writes it; 0 in any other.
    """

    name: ClassVar[str] = "drafted"

    def value(self, logits, proposal, token):
        """Zeros."""
        return jnp.zeros_like(token)


@dataclasses.dataclass(frozen=True)
class Accepted(Drafted):
    """1 where the token is an accepted draft, ``[B]`` int32; 0 where it was drawn."""

    name: ClassVar[str] = "accepted"


@dataclasses.dataclass(frozen=True)
class DraftedModel:
    """A target and its drafter as one model: a prompt is read by both, a fork forks both caches."""

    target: nnx.Module
    drafter: Drafter

    def init_cache(self, batch: int, max_length: int) -> tuple[Any, Any]:
        """The caches of both."""
        caches = (part.init_cache(batch, max_length) for part in (self.target, self.drafter))
        return tuple(caches)

    def __call__(self, tokens, cache, *, segment_ids):
        """The target's logits, and the caches of both."""
        logits, target = self.target(tokens, cache[0], segment_ids=segment_ids)
        return logits, (target, self.drafter.read(tokens, cache[1], segment_ids))


def judge(
    policy: Policy,
    logits: Float[Array, "B V"],
    context: Context,
    key: PRNGKeyArray,
    draft: Int[Array, "B"],
    draft_logits: Float[Array, "B V"] | None,
    drafted: Bool[Array, "B"],
) -> tuple[Int[Array, "B"], Bool[Array, "B"], Float[Array, "B V"], Bool[Array, "B"]]:
    """One token a row, and whether it is the draft; drawn from the policy's proposal either way.

    Args:
        policy: whose proposal is ``p``.
        logits: the model's.
        context: that the policy sees; its tokens before ``length`` are committed.
        key: of rows; what is drawn depends on it and on the position alone.
        draft: ids below V.
        draft_logits: ``q``, which each draft was drawn from; None if it had all the probability.
        drafted: rows that have a draft. In the others the draw is that of plain decoding.

    Returns:
        The token, whether the draft was accepted, the proposal, and which rows starved.
    """
    proposal, starved = propose(policy, logits, context)
    if policy.deterministic:
        token = jnp.argmax(proposal, axis=-1).astype(draft.dtype)
        return token, drafted & (token == draft), proposal, starved
    is_draft = jnp.arange(logits.shape[-1]) == draft[:, None]
    p = jax.nn.softmax(proposal)
    q = is_draft.astype(p.dtype) if draft_logits is None else jax.nn.softmax(draft_logits)
    p_draft, q_draft = (jnp.sum(jnp.where(is_draft, x, 0), axis=-1) for x in (p, q))
    u = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t), (), jnp.float32))
    accepted = drafted & (u(aside(key, ACCEPT), context.length) * q_draft < p_draft)
    left = jnp.log(jnp.maximum(p - q, 0))
    # Nothing is left only where rounding alone made p and q differ.
    left = jnp.where(jnp.any(left > -jnp.inf, axis=-1, keepdims=True), left, proposal)
    keys = jax.vmap(jax.random.fold_in)(key, context.length)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(drafted[:, None], left, proposal))
    return jnp.where(accepted, draft, drawn.astype(draft.dtype)), accepted, proposal, starved


def speculative_step(
    model: DraftedModel,
    policy: Policy,
    stop_tokens: Int[Array, "B S"],
    records: Sequence[Record] = (LogProb(),),
) -> Callable[[DecodeState], DecodeState]:
    """The step that commits up to G + 1 tokens a running row: accepted drafts and one draw.

    The target is called once with the last token and the G drafts of each row, and once more with
    the accepted ones where it is recurrent and some row's drafts were not all accepted. The state's
    cache is the pair of :class:`DraftedModel`; the canvas needs G positions beyond every limit.
    """

    def step(state: DecodeState) -> DecodeState:
        before, draft_before = state.cache
        drafts, draft_after = model.drafter.draft(
            policy, dataclasses.replace(state, cache=draft_before)
        )
        inputs = jnp.concatenate([last_token(state), drafts.tokens], axis=1)
        said, after = read(model.target, inputs, before)
        count = jnp.minimum(drafts.count, state.limit - state.length)

        def position(carry):
            # The context is that of plain decoding: what was accepted is committed already.
            i, state, alive = carry
            here = jax.tree.map(lambda x: _at(x, i, 1), said)
            # At the last position, which nothing was drafted for, any draft will do.
            k = jnp.minimum(i, inputs.shape[1] - 2)
            q = None if drafts.logits is None else _at(drafts.logits, k, 0)
            token, accepted, proposal, starved = judge(
                policy,
                here.logits,
                context_of(state, here.predicted),
                state.key,
                _at(drafts.tokens, k, 1),
                q,
                i < count,
            )
            recorded = {r.name: r.value(here.logits, proposal, token) for r in records}
            recorded[Drafted.name] = jnp.where(i == 0, count, 0)
            recorded[Accepted.name] = accepted.astype(token.dtype)
            state = dataclasses.replace(state, starved=state.starved | (starved & alive))
            state = commit(state, token, stop_tokens, recorded, active=alive)
            return i + 1, state, alive & accepted & ~state.done

        def unsettled(carry):
            i, _, alive = carry
            return (i < inputs.shape[1]) & jnp.any(alive)

        start = jnp.int32(0), dataclasses.replace(state, cache=()), ~state.done
        _, new, _ = jax.lax.while_loop(unsettled, position, start)
        kept = new.length - state.length
        target_layout, draft_layout = (
            CacheLayout.of(part, state.tokens.shape[1]) for part in (model.target, model.drafter)
        )

        def read_target(tokens, cache, segment_ids):
            return model.target(tokens, cache, segment_ids=segment_ids)[1]

        caches = (
            settle(target_layout, read_target, before, after, inputs, kept),
            settle(draft_layout, model.drafter.read, draft_before, draft_after, inputs, kept),
        )
        return dataclasses.replace(new, cache=caches)

    return step


def settle(
    layout: CacheLayout,
    read: Callable[..., Any],
    before: Any,
    after: Any,
    inputs: Int[Array, "B T"],
    kept: Int[Array, "B"],
) -> Any:
    """The cache that has read each row's first ``kept`` inputs, 0 of them in rows that are done.

    What is addressed by position is rewound by its length. Recurrent rows that have read too much
    go back to the state before and read the kept inputs again; no row depends on its neighbours'.

    Args:
        layout: of the cache.
        read: ``(tokens, cache, segment_ids) -> cache``.
        before: the cache that has read none of the inputs.
        after: the one that has read all of them.
        inputs: what was read.
        kept: ``0..T``.
    """
    if not layout.is_recurrent:
        length = [x + kept for x in layout.recurrent(before)]
        return layout.with_recurrent(after, length)
    total = inputs.shape[1]
    back = (kept > 0) & (kept < total)
    cache = layout.recurrent_where(kept == total, after, before)

    def read_again(cache):
        again = (jnp.arange(total) < kept[:, None]) & back[:, None]
        read_kept = read(inputs * again, cache, again.astype(jnp.int32))
        return layout.recurrent_where(back, read_kept, cache)

    return jax.lax.cond(jnp.any(back), read_again, lambda cache: cache, cache)


@dataclasses.dataclass(frozen=True, eq=False)
class Speculative(NextToken):
    """The compiled speculative decoder; its ``params`` are ``(the target's, the drafter)``."""

    def bind(self, params: tuple[Any, Drafter]) -> DraftedModel:
        """The two as one model."""
        target, drafter = params
        return DraftedModel(nnx.merge(self.graphdef, target), drafter)

    def step(self, model, policy, layout, stop_tokens):
        """See :func:`speculative_step`."""
        return speculative_step(model, policy, stop_tokens, self.records)


def _at(x: Array, index: Int[Array, ""], axis: int) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)
