"""Next-token decoding: prefill a batch of prompts, then commit one token a row and step."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..sharding import Params, constrain
from .loop import LENGTH, RUNNING, STOPPED, DecodeState, run
from .policy import Policy


@dataclasses.dataclass(frozen=True, eq=False)
class NextToken:
    """The autoregressive decoder of one model structure under one policy.

    Holds the compiled functions, so keep it: a new one compiles again.

    Attributes:
        graphdef: the model's structure.
        policy: that tokens are drawn by.
    """

    graphdef: nnx.GraphDef
    policy: Policy

    @functools.cached_property
    def prefill(self):
        """Jitted ``(params, prompts [B, P], lengths, limits, seeds, capacity) -> DecodeState``.

        Prompts stand first in their rows; ``capacity`` (static) is the canvas's width, at least
        ``max(limits)``.
        """
        return jax.jit(self._prefill, static_argnames="capacity")

    @functools.cached_property
    def decode(self):
        """Jitted ``(params, state, stop_tokens [S], max_steps) -> state``; the state is donated."""
        return jax.jit(self._decode, donate_argnums=1)

    def _prefill(
        self,
        params: Params,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        limits: Int[Array, "B"],
        seeds: Int[Array, "B"],
        *,
        capacity: int,
    ) -> DecodeState:
        model = nnx.merge(self.graphdef, params)
        prompts = constrain(prompts, "batch", "seq")
        lengths, limits, seeds = (constrain(x, "batch") for x in (lengths, limits, seeds))
        batch, width = prompts.shape
        valid = (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)
        cache = model.init_cache(batch, capacity)
        hidden, cache, _ = model.hidden_states(prompts, cache, segment_ids=valid)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        tokens = jnp.pad(prompts * valid, ((0, 0), (0, capacity - width)))
        logprobs = jnp.zeros((batch, capacity), jnp.float32)
        return DecodeState(
            tokens=tokens,
            logprobs=constrain(logprobs, "batch", "seq"),
            length=lengths,
            limit=limits,
            reason=jnp.where(lengths >= limits, LENGTH, RUNNING).astype(jnp.int32),
            logits=_whole_rows(model.logits(last)),
            cache=cache,
            key=jax.vmap(jax.random.key)(seeds),
        )

    def _decode(
        self,
        params: Params,
        state: DecodeState,
        stop_tokens: Int[Array, "S"],
        max_steps: Int[Array, ""],
    ) -> DecodeState:
        model = nnx.merge(self.graphdef, params)

        def step(state: DecodeState) -> DecodeState:
            token = self._draw(state.key, state.length, state.logits)
            state = commit(state, token, stop_tokens)
            logits, cache = model(token[:, None], state.cache)
            return dataclasses.replace(state, logits=_whole_rows(logits), cache=cache)

        return run(step, state, max_steps)

    def _draw(self, key, position, logits: Float[Array, "B V"]) -> Int[Array, "B"]:
        """One token a row; its randomness is a function of the row's seed and position alone."""
        proposal = self.policy(logits)
        if self.policy.deterministic:
            return jnp.argmax(proposal, axis=-1).astype(jnp.int32)
        keys = jax.vmap(jax.random.fold_in)(key, position)
        return jax.vmap(jax.random.categorical)(keys, proposal).astype(jnp.int32)


def _whole_rows(logits: Float[Array, "B 1 V"]) -> Float[Array, "B V"]:
    """Each row's vocabulary in one place: a policy ranks and draws over all of it."""
    return constrain(logits[:, 0], "batch", None)


def commit(state: DecodeState, token: Int[Array, "B"], stop_tokens: Int[Array, "S"]) -> DecodeState:
    """Write one token a running row, with its log-probability, and end the rows that it ends.

    A stop token is committed too. Rows that are done stay as they are.
    """
    running = ~state.done
    logprob = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)[:, 0]
    here = (jnp.arange(state.tokens.shape[1]) == state.length[:, None]) & running[:, None]
    length = state.length + running
    stopped = jnp.any(token[:, None] == stop_tokens, axis=1)
    ended = jnp.where(stopped, STOPPED, jnp.where(length >= state.limit, LENGTH, RUNNING))
    return dataclasses.replace(
        state,
        tokens=jnp.where(here, token[:, None], state.tokens),
        logprobs=jnp.where(here, logprob[:, None], state.logprobs),
        length=length,
        reason=jnp.where(running, ended, state.reason).astype(jnp.int32),
    )
