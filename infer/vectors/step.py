"""The next-vector step of the shared loop, a chunk of K tokens, and its compiled functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from ...layers.chunks import from_chunks, to_chunks
from ...sharding import Params, constrain
from ..cache import CacheLayout
from ..loop import LENGTH, RUNNING, STOPPED, DecodeState
from ..next_token import NextToken, row_keys
from .draws import BatchRows, Drawn, ExactRows, draw_chunks

_ROWS = ("batch", "seq")
# What is written down of a chunk, at its first new token: draws of the model, and whether they were
# too few.
RECORDS = {"draws": jnp.int32, "exhausted": jnp.bool_}


def prefill(
    model: nnx.Module,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    keys: PRNGKeyArray,
    *,
    capacity: int,
) -> DecodeState:
    """The state in which the whole chunks of every prompt have been read, but for the last of them.

    Tokens after a prompt's last whole chunk stand on the canvas beyond the row's length: the chunk
    that is drawn there must begin with them.

    Args:
        model: the merged module.
        prompts: each first in its row, of at least one whole chunk; ``P`` is whole chunks.
        lengths: of the prompts.
        limits: length at which each row ends, its prompt included.
        keys: one a row.
        capacity: the canvas's width, whole chunks, at least ``max(limits)``.
    """
    size = model.config.chunk_size
    prompts = constrain(prompts, *_ROWS)
    lengths, limits, keys = (constrain(x, "batch") for x in (lengths, limits, keys))
    batch, width = prompts.shape
    places = jnp.arange(width)
    whole = lengths // size * size
    read = (places < whole[:, None] - size).astype(jnp.int32)
    cache = model.init_cache(batch, capacity // size)
    _, cache = model(prompts * read, cache, segment_ids=read)
    shown = prompts * (places < lengths[:, None])
    tokens = jnp.pad(shown, ((0, 0), (0, capacity - width)))
    return DecodeState(
        tokens=constrain(tokens, *_ROWS),
        length=whole,
        prompt_length=lengths,
        limit=limits,
        reason=jnp.where(lengths >= limits, LENGTH, RUNNING).astype(jnp.int32),
        starved=constrain(jnp.zeros((batch,), bool), "batch"),
        key=keys,
        cache=cache,
        records={
            name: constrain(jnp.zeros((batch, capacity), dtype), *_ROWS)
            for name, dtype in RECORDS.items()
        },
    )


def chunk_at(
    tokens: Int[Array, "B T"], index: Int[Array, "B"], chunk_size: int
) -> Int[Array, "B K"]:
    """The chunk of each row with this number."""
    # A masked sum instead of a gather: it shards as the canvas does.
    chunks = to_chunks(tokens, chunk_size)
    here = jnp.arange(chunks.shape[1]) == index[:, None]
    found = jnp.sum(jnp.where(here[:, :, None], chunks, 0), axis=1, dtype=chunks.dtype)
    return constrain(found, "batch", None)


def commit(
    state: DecodeState, drawn: Drawn, stop_tokens: Int[Array, "B S"], chunk_size: int
) -> DecodeState:
    """Write a chunk a running row, up to its first stop token or the row's limit.

    A stop token is committed too, if it is none of the prompt's. Rows that are done stay as they
    are.
    """
    running = ~state.done
    place = state.length[:, None] + jnp.arange(chunk_size)
    new = place >= state.prompt_length[:, None]
    inside = new & (place < state.limit[:, None])
    stops = jnp.any(drawn.chunk[:, :, None] == stop_tokens[:, None, :], axis=-1) & inside
    earlier = jnp.cumsum(stops, axis=1) - stops
    kept = ~new | (inside & (earlier == 0))
    length = state.length + jnp.sum(kept, axis=1, dtype=jnp.int32)
    ended = jnp.where(length >= state.limit, LENGTH, RUNNING)
    ended = jnp.where(jnp.any(stops, axis=1), STOPPED, ended)

    chunks = to_chunks(state.tokens, chunk_size)
    number = (state.length // chunk_size)[:, None]
    here = (jnp.arange(chunks.shape[1]) == number) & running[:, None]
    chunk = jnp.where(kept, drawn.chunk, 0)[:, None]
    tokens = from_chunks(jnp.where(here[:, :, None], chunk, chunks))
    first = jnp.maximum(state.length, state.prompt_length)[:, None]
    at = (jnp.arange(tokens.shape[1]) == first) & running[:, None]
    said = {"draws": drawn.draws, "exhausted": drawn.exhausted}
    return dataclasses.replace(
        state,
        tokens=constrain(tokens, *_ROWS),
        length=jnp.where(running, length, state.length),
        reason=jnp.where(running, ended, state.reason).astype(jnp.int32),
        records={
            name: jnp.where(at, said[name][:, None], row) for name, row in state.records.items()
        },
    )


def next_vector_step(
    model: nnx.Module,
    rows: ExactRows | BatchRows,
    layout: CacheLayout,
    stop_tokens: Int[Array, "B S"],
) -> Callable[[DecodeState], DecodeState]:
    """The step that commits a chunk a running row: read the last one, draw, write.

    Between steps the cache has read all whole chunks but the last.
    """
    size = model.config.chunk_size

    def step(state: DecodeState) -> DecodeState:
        last = chunk_at(state.tokens, (state.length - 1) // size, size)
        hidden, cache, _ = model.hidden_states(last, state.cache)
        cache = layout.recurrent_where(~state.done, cache, state.cache)

        def base(keys):
            noise = jax.vmap(jax.vmap(lambda key: model.latent_head.noise(key, ())))(keys)
            noise = constrain(noise, "batch", *(None,) * (noise.ndim - 1))
            return model.tokens(model.draw(hidden, noise))

        place = state.length[:, None] + jnp.arange(size)
        drawn = draw_chunks(
            rows,
            base,
            jax.vmap(jax.random.fold_in)(state.key, state.length),
            given=chunk_at(state.tokens, state.length // size, size),
            fixed=place < state.prompt_length[:, None],
            active=~state.done,
        )
        return commit(dataclasses.replace(state, cache=cache), drawn, stop_tokens, size)

    return step


@dataclasses.dataclass(frozen=True, eq=False)
class NextVector(NextToken):
    """The compiled next-vector decoder of one model structure.

    As :class:`~..next_token.NextToken`, without records of the caller's choice. Temperatures and
    budgets are traced, so one compilation serves all of a kind.
    """

    def step(
        self,
        model: nnx.Module,
        policy: ExactRows | BatchRows,
        layout: CacheLayout,
        stop_tokens: Int[Array, "B S"],
    ) -> Callable[[DecodeState], DecodeState]:
        """The step of :attr:`decode`."""
        return next_vector_step(model, policy, layout, stop_tokens)

    @functools.cached_property
    def prefill(self):
        """Jitted ``(params, prompts [B, P], lengths, limits, seeds, samples, *, capacity, needs)``.

        As that of :class:`~..next_token.NextToken`; see :func:`prefill`.
        """

        def run_prefill(
            params: Params, prompts, lengths, limits, seeds, samples, *, capacity, needs=frozenset()
        ):
            del needs
            model, keys = self.bind(params), row_keys(seeds, samples)
            return prefill(model, prompts, lengths, limits, keys, capacity=capacity)

        return jax.jit(run_prefill, static_argnames=("capacity", "needs"))
