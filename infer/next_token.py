"""Next-token decoding: prefill a batch of prompts, then commit one token a row and step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..sharding import Params, constrain, kernel_map
from .cache import CacheLayout
from .loop import LENGTH, RUNNING, STOPPED, DecodeState, run
from .policy import Context, Counts, Policy, propose
from .records import LogProb, Record


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """What a model says of each row's next token.

    Attributes:
        logits: ``[B, V]`` float32.
        predicted: ``(temperature [B], top_p [B])`` of its decoding heads; None without them.
    """

    logits: Any
    predicted: Any = None


def prefill(
    model: nnx.Module,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    keys: PRNGKeyArray,
    *,
    capacity: int,
    records: Sequence[Record] = (LogProb(),),
    needs: frozenset[str] = frozenset(),
) -> DecodeState:
    """The state in which every prompt has been read, but for its last token.

    Args:
        model: the merged module.
        prompts: each first in its row, of ``lengths`` tokens, at least one.
        lengths: of the prompts.
        limits: length at which each row ends, its prompt included.
        keys: one a row.
        capacity: the canvas's width, at least ``max(limits)``.
        records: what to write down of the tokens to come.
        needs: of the policy to come.
    """
    prompts = constrain(prompts, "batch", "seq")
    lengths, limits, keys = (constrain(x, "batch") for x in (lengths, limits, keys))
    batch, width = prompts.shape
    places = jnp.arange(width)
    read = (places < lengths[:, None] - 1).astype(jnp.int32)
    cache = model.init_cache(batch, capacity)
    logits, cache = model(prompts * read, cache, segment_ids=read)
    logits = constrain(logits[:, 0], "batch", None)  # For its shape: no product of it is computed.
    shown = prompts * (places < lengths[:, None])
    tokens = jnp.pad(shown, ((0, 0), (0, capacity - width)))
    values = {r.name: jax.eval_shape(r.value, logits, logits, lengths) for r in records}
    counts = None
    if "counts" in needs:
        counts = _counts(prompts, lengths, logits.shape[-1])
    return DecodeState(
        tokens=constrain(tokens, "batch", "seq"),
        length=lengths,
        prompt_length=lengths,
        limit=limits,
        reason=jnp.where(lengths >= limits, LENGTH, RUNNING).astype(jnp.int32),
        starved=constrain(jnp.zeros((batch,), bool), "batch"),
        key=keys,
        cache=cache,
        records={
            name: constrain(
                jnp.zeros((batch, capacity, *value.shape[1:]), value.dtype),
                *("batch", "seq", *(None for _ in value.shape[1:])),
            )
            for name, value in values.items()
        },
        counts=counts,
    )


def last_token(state: DecodeState) -> Int[Array, "B 1"]:
    """The last committed token of each row."""
    # A masked sum instead of a gather: it shards as the canvas does.
    last = jnp.arange(state.tokens.shape[1]) == state.length[:, None] - 1
    return jnp.sum(jnp.where(last, state.tokens, 0), axis=1, keepdims=True, dtype=jnp.int32)


def read(model: nnx.Module, tokens: Int[Array, "B T"], cache: Any) -> tuple[Forward, Any]:
    """What the model says after each of ``tokens`` (axes ``[B, T, ...]``), and the new cache."""
    predicted = None
    heads = getattr(model, "decoding_heads", None)
    if heads is None:
        logits, cache = model(tokens, cache)
    else:
        hidden, cache, _ = model.hidden_states(tokens, cache)
        logits = model.logits(hidden)
        predicted = tuple(heads(hidden, logits))
    # Each row's vocabulary in one place: a policy ranks and draws over all of it.
    return Forward(constrain(logits, "batch", None, None), predicted), cache


def forward(model: nnx.Module, layout: CacheLayout, state: DecodeState) -> tuple[Forward, Any]:
    """Read each row's last token: what comes next, and the cache (unmoved where a row is done)."""
    said, cache = read(model, last_token(state), state.cache)
    said = jax.tree.map(lambda x: x[:, 0], said)
    return said, layout.recurrent_where(~state.done, cache, state.cache)


def draw(
    policy: Policy, logits: Float[Array, "B V"], context: Context, key: PRNGKeyArray
) -> tuple[Int[Array, "B"], Float[Array, "B V"], Bool[Array, "B"]]:
    """One token a row, the proposal it came from, and which rows starved.

    Its randomness is a function of the row's key and position alone.
    """
    proposal, starved = propose(policy, logits, context)
    if policy.deterministic:
        return jnp.argmax(proposal, axis=-1).astype(jnp.int32), proposal, starved
    keys = jax.vmap(jax.random.fold_in)(key, context.length)
    token = jax.vmap(jax.random.categorical)(keys, proposal).astype(jnp.int32)
    return token, proposal, starved


def context_of(state: DecodeState, predicted: Any = None) -> Context:
    """What a policy may see of a state."""
    return Context(state.tokens, state.length, state.prompt_length, state.counts, predicted)


def commit(
    state: DecodeState,
    token: Int[Array, "B"],
    stop_tokens: Int[Array, "B S"],
    recorded: dict[str, Array],
    active: Bool[Array, "B"] | None = None,
) -> DecodeState:
    """Write one token a running row, with what is recorded of it, and end the rows that it ends.

    A stop token is committed too. Rows that are done, or not ``active``, stay as they are.
    """
    running = ~state.done if active is None else ~state.done & active
    here = (jnp.arange(state.tokens.shape[1]) == state.length[:, None]) & running[:, None]

    def write(row, value):
        shape = (*here.shape, *(1,) * (value.ndim - 1))
        return jnp.where(here.reshape(shape), value[:, None], row)

    length = state.length + running
    stopped = jnp.any(token[:, None] == stop_tokens, axis=1)
    ended = jnp.where(stopped, STOPPED, jnp.where(length >= state.limit, LENGTH, RUNNING))
    counts = state.counts
    if counts is not None:
        drawn = (jnp.arange(counts.output.shape[1]) == token[:, None]) & running[:, None]
        counts = dataclasses.replace(counts, output=counts.output + drawn)
    return dataclasses.replace(
        state,
        tokens=write(state.tokens, token),
        length=length,
        reason=jnp.where(running, ended, state.reason).astype(jnp.int32),
        records={name: write(row, recorded[name]) for name, row in state.records.items()},
        counts=counts,
    )


def draw_and_commit(
    policy: Policy,
    state: DecodeState,
    said: Forward,
    stop_tokens: Int[Array, "B S"],
    records: Sequence[Record],
) -> DecodeState:
    """The second half of a step: from what the model said to a longer canvas."""
    context = context_of(state, said.predicted)
    token, proposal, starved = draw(policy, said.logits, context, state.key)
    recorded = {r.name: r.value(said.logits, proposal, token) for r in records}
    starved = state.starved | (starved & ~state.done)
    return commit(dataclasses.replace(state, starved=starved), token, stop_tokens, recorded)


def next_token_step(
    model: nnx.Module,
    policy: Policy,
    layout: CacheLayout,
    stop_tokens: Int[Array, "B S"],
    records: Sequence[Record] = (LogProb(),),
) -> Callable[[DecodeState], DecodeState]:
    """The step that commits one token a running row: read the last one, draw, write."""

    def step(state: DecodeState) -> DecodeState:
        said, cache = forward(model, layout, state)
        state = dataclasses.replace(state, cache=cache)
        return draw_and_commit(policy, state, said, stop_tokens, records)

    return step


@dataclasses.dataclass(frozen=True, eq=False)
class NextToken:
    """The compiled autoregressive decoder of one model structure.

    Holds the compiled functions, so keep it: a new one compiles again. A policy's numbers are
    traced, so one compilation serves all policies of the same stages.

    Attributes:
        graphdef: the model's structure.
        records: what is written down of each token.
    """

    graphdef: nnx.GraphDef
    records: tuple[Record, ...] = (LogProb(),)

    def bind(self, params: Params) -> nnx.Module:
        """The model that the loop calls, of what its compiled functions get as ``params``."""
        return nnx.merge(self.graphdef, params)

    def step(
        self, model: nnx.Module, policy: Policy, layout: CacheLayout, stop_tokens: Int[Array, "B S"]
    ) -> Callable[[DecodeState], DecodeState]:
        """The step of :attr:`decode`."""
        return next_token_step(model, policy, layout, stop_tokens, self.records)

    @functools.cached_property
    def prefill(self):
        """Jitted ``(params, prompts [B, P], lengths, limits, seeds, samples, *, capacity, needs)``.

        Returns the state; ``capacity`` and ``needs`` are static; see :func:`prefill`.
        """

        def run_prefill(
            params, prompts, lengths, limits, seeds, samples, *, capacity, needs=frozenset()
        ):
            return prefill(
                self.bind(params),
                prompts,
                lengths,
                limits,
                row_keys(seeds, samples),
                capacity=capacity,
                records=self.records,
                needs=needs,
            )

        return jax.jit(run_prefill, static_argnames=("capacity", "needs"))

    @functools.cached_property
    def decode(self):
        """Jitted ``(params, policy, state, stop_tokens, max_steps) -> state``; donates it."""

        def run_decode(
            params: Params, policy: Policy, state: DecodeState, stop_tokens, max_steps
        ) -> DecodeState:
            model = self.bind(params)
            layout = CacheLayout.of(model, state.tokens.shape[1])
            return run(self.step(model, policy, layout, stop_tokens), state, max_steps)

        return jax.jit(run_decode, donate_argnums=2)

    @functools.cached_property
    def fork(self):
        """Jitted ``(params, state, rows, limits, seeds, samples) -> state``: these rows, forked.

        They may repeat; each gets its own limit and key.
        """

        def run_fork(params, state, rows, limits, seeds, samples):
            layout = CacheLayout.of(self.bind(params), state.tokens.shape[1])
            forked = state.take(layout, rows).with_limit(constrain(limits, "batch"))
            return dataclasses.replace(forked, key=constrain(row_keys(seeds, samples), "batch"))

        return jax.jit(run_fork)


def row_keys(seeds: Int[Array, "B"], samples: Int[Array, "B"]) -> PRNGKeyArray:
    """A key a row, from its request's seed and which of the request's samples it is."""
    return jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seeds, samples)


def _counts(prompts: Int[Array, "B P"], lengths: Int[Array, "B"], vocab_size: int) -> Counts:
    """Counts of the prompts' tokens; nothing is generated yet."""

    def count(prompts, lengths):
        rows = jnp.arange(prompts.shape[0])[:, None]
        inside = (jnp.arange(prompts.shape[1]) < lengths[:, None]).astype(jnp.int32)
        return jnp.zeros((prompts.shape[0], vocab_size), jnp.int32).at[rows, prompts].add(inside)

    row = ("batch", None)
    prompt = kernel_map(count, (row, row[:1]), row)(prompts, lengths)
    return Counts(prompt=prompt, output=jnp.zeros_like(prompt))
