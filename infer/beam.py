"""Beam search: the likeliest responses that a search of bounded width finds.

Of a prompt's K live beams all continuations are scored, and the best are kept: those that end join
the finished, the K best others live on. A response's score is its log-probability over
``length ** length_penalty``, its stop token counted in both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..errors import InputError
from ..model.handle import Model
from ..sharding import constrain, kernel_map
from .cache import CacheLayout
from .loop import FINISH_REASONS, LENGTH, STOPPED, DecodeState, run
from .next_token import NextToken, commit, context_of, forward
from .policy import Policy, propose
from .programs import program_of, read_prompts
from .request import Batch, Prompts, make_batch


@dataclasses.dataclass(frozen=True)
class BeamResult:
    """What a search found, prompt by prompt, the best first.

    A prompt has ``n`` responses, or fewer where no more were possible.

    Attributes:
        tokens: of each response, its stop token included where it has one.
        text: the tokens decoded, without the stop token.
        scores: ``logprob / length ** length_penalty``.
        logprobs: of whole responses, float32, in nats.
        finish_reasons: ``"stop"`` or ``"length"``.
    """

    tokens: list[list[np.ndarray]]
    text: list[list[str]]
    scores: list[list[float]]
    logprobs: list[list[float]]
    finish_reasons: list[list[str]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """The best finished responses of every prompt: K rows each, best first.

    Attributes:
        tokens: ``[R, T]`` canvases, R = K B.
        length: ``[R]``, the prompt's included.
        logprob, score: ``[R]``; a score of ``-inf`` is an empty row.
        reason: ``[R]``, ``STOPPED`` or ``LENGTH``.
    """

    tokens: Int[Array, "R T"]
    length: Int[Array, "R"]
    logprob: Float[Array, "R"]
    score: Float[Array, "R"]
    reason: Int[Array, "R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """Live beams, K rows a prompt, and what has finished.

    Attributes:
        live: the loop's state of R = K B rows; a prompt's rows are done together.
        logprob: ``[R]`` of the tokens committed after the prompt; ``-inf`` is no beam.
        pool: of finished responses.
    """

    live: DecodeState
    logprob: Float[Array, "R"]
    pool: Pool

    @property
    def done(self) -> Bool[Array, "R"]:
        """Rows whose prompt's search has ended."""
        return self.live.done


def begin(live: DecodeState, num_beams: int) -> BeamState:
    """The search's first state: K equal rows a prompt, of which one is a beam."""
    first = constrain(jnp.arange(live.length.shape[0]) % num_beams == 0, "batch")
    zeros = jnp.zeros_like(live.length, dtype=jnp.float32)
    pool = Pool(
        tokens=jnp.zeros_like(live.tokens),
        length=jnp.zeros_like(live.length),
        logprob=zeros,
        score=zeros - jnp.inf,
        reason=jnp.zeros_like(live.reason),
    )
    return BeamState(live, jnp.where(first, zeros, -jnp.inf), pool)


def beam_step(
    model: nnx.Module,
    policy: Policy,
    layout: CacheLayout,
    stop_tokens: Int[Array, "R S"],
    length_penalty: Float[Array, ""],
    num_beams: int,
    early: bool = False,
) -> Callable[[BeamState], BeamState]:
    """The step that makes every live beam one token longer.

    Looks at the ``(1 + S) K`` best continuations of a prompt, of which at least K do not end. At
    the limit every continuation is finished. A prompt's search ends when no live beam can still
    beat its K-th finished response.
    """
    never = jnp.full((1, 1), -1)

    def step(state: BeamState) -> BeamState:
        said, cache = forward(model, layout, state.live)
        live = dataclasses.replace(state.live, cache=cache)
        proposal, starved = propose(policy, said.logits, context_of(live, said.predicted))
        # A beam whose policy forbids every token has no continuation.
        log_p = jnp.where(starved[:, None], -jnp.inf, jax.nn.log_softmax(proposal))
        chosen, pool = _select(state, log_p, stop_tokens, length_penalty, num_beams, early)
        rows, running = constrain(jnp.arange(log_p.shape[0]), "batch"), ~live.done
        parent = jnp.where(running, rows - rows % num_beams + chosen.parent, rows)
        live = commit(live.take(layout, parent), chosen.token, never, {})
        reason = jnp.where(chosen.over & ~live.done, STOPPED, live.reason).astype(jnp.int32)
        live = dataclasses.replace(live, reason=reason)
        return BeamState(live, jnp.where(running, chosen.logprob, state.logprob), pool)

    return step


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The next live beams ``[R]``: whose continuations (0..K-1), by which token, how likely.

    ``over`` says of a prompt's rows that no live beam can beat its K-th finished response.
    """

    parent: Int[Array, "R"]
    token: Int[Array, "R"]
    logprob: Float[Array, "R"]
    over: Bool[Array, "R"]


def _select(
    state: BeamState,
    log_p: Float[Array, "R V"],
    stop_tokens: Int[Array, "R S"],
    length_penalty: Float[Array, ""],
    num_beams: int,
    early: bool,
) -> tuple[_Chosen, Pool]:
    """The next live beams, and the pool with the responses that this step finished.

    Done on every device for its own prompts, whose rows are together on it.
    """
    k, live = num_beams, state.live

    def select(log_p, stops, logprob, tokens, length, start, limit, done, penalty, *pool):
        prompts, size = len(log_p) // k, log_p.shape[1]

        def by_prompt(x):
            return x.reshape(prompts, k, *x.shape[1:])

        # All beams of a prompt are equally long.
        length, start, limit, done, penalty, stops = (
            by_prompt(x)[:, 0] for x in (length, start, limit, done, penalty, stops)
        )
        tokens, logprob, pool = by_prompt(tokens), by_prompt(logprob), Pool(*map(by_prompt, pool))
        total = (logprob[..., None] + by_prompt(log_p)).reshape(prompts, k * size)
        total, index = jax.lax.top_k(total, min((1 + stops.shape[1]) * k, k * size))
        parent, token = index // size, index % size
        stopped = jnp.any(token[..., None] == stops[:, None], axis=-1)

        new = (length + 1 - start).astype(jnp.float32)
        finished = (stopped | (length + 1 >= limit)[:, None]) & ~done[:, None]
        score = jnp.where(finished, total / (new**penalty)[:, None], -jnp.inf)
        score, best = jax.lax.top_k(jnp.concatenate([pool.score, score], axis=1), k)

        def merge(kept, added):
            return jnp.take_along_axis(jnp.concatenate([kept, added], axis=1), best, axis=1)

        # A continuation is its parent's canvas with one more token; the pool's stay as they are.
        row = merge(jnp.broadcast_to(jnp.arange(k), (prompts, k)), k + parent)
        canvas = jnp.concatenate([pool.tokens, tokens], axis=1)
        canvas = jnp.take_along_axis(canvas, row[..., None], axis=1)
        here = jnp.arange(canvas.shape[2]) == length[:, None, None]
        written = merge(jnp.zeros((prompts, k), token.dtype), token)
        pool = Pool(
            tokens=jnp.where(here & (best >= k)[..., None], written[..., None], canvas),
            length=merge(pool.length, jnp.broadcast_to(length[:, None] + 1, token.shape)),
            logprob=merge(pool.logprob, total),
            score=score,
            reason=merge(pool.reason, jnp.where(stopped, STOPPED, LENGTH).astype(jnp.int32)),
        )

        logprob, best = jax.lax.top_k(jnp.where(stopped, -jnp.inf, total), k)
        parent, token = (jnp.take_along_axis(x, best, axis=1) for x in (parent, token))
        # Log-probabilities only fall. Where length excuses that, the longest is the best possible;
        # elsewhere it is the next token, which every live beam still needs.
        longest = new if early else (limit - start).astype(jnp.float32)
        reach = jnp.where(penalty > 0, longest, new + 1)
        over = logprob[:, 0] / reach**penalty <= score[:, -1]
        over = jnp.broadcast_to(over[:, None], (prompts, k))
        chosen = (parent, token, logprob, over)
        pool = (pool.tokens, pool.length, pool.logprob, pool.score, pool.reason)
        return tuple(x.reshape(prompts * k, *x.shape[2:]) for x in (*chosen, *pool))

    def axes(x):
        return ("batch", *(None,) * (x.ndim - 1))

    pool = tuple(getattr(state.pool, f.name) for f in dataclasses.fields(Pool))
    penalty = jnp.full_like(state.logprob, length_penalty)
    rows = (live.tokens, live.length, live.prompt_length, live.limit, live.done, penalty, *pool)
    arrays = (log_p, stop_tokens, state.logprob, *rows)
    row = ("batch",)
    out = kernel_map(
        select, [axes(x) for x in arrays], (row, row, row, row, *(axes(x) for x in pool))
    )(*arrays)
    return _Chosen(*out[:4]), Pool(*out[4:])


@dataclasses.dataclass(frozen=True, eq=False)
class BeamSearch:
    """The compiled search of one model structure.

    Attributes:
        graphdef: the model's structure.
        num_beams: K.
        early: see :func:`beam_search`.
    """

    graphdef: nnx.GraphDef
    num_beams: int
    early: bool = False

    @functools.cached_property
    def search(self):
        """Jitted ``(params, policy, live, stop_tokens, length_penalty) -> BeamState``; donates."""

        def run_search(params, policy, live, stop_tokens, length_penalty):
            model = nnx.merge(self.graphdef, params)
            layout = CacheLayout.of(model, live.tokens.shape[1])
            step = beam_step(
                model, policy, layout, stop_tokens, length_penalty, self.num_beams, self.early
            )
            return run(step, begin(live, self.num_beams))

        return jax.jit(run_search, donate_argnums=2)


def beam_search(
    model: Model,
    prompts: Prompts,
    num_beams: int,
    max_new_tokens: int | Sequence[int] = 128,
    length_penalty: float = 1.0,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
    n: int = 1,
    *,
    policy: Policy | Sequence[Policy] | None = None,
    early: bool = False,
) -> BeamResult:
    """The ``n`` best responses to each prompt that a search of ``num_beams`` beams finds.

    Args:
        model: as :func:`jaxalope.load` returns it.
        prompts: text, or token ids; of any lengths.
        num_beams: K; 1 is greedy decoding where there are no stop tokens.
        max_new_tokens: that a response may have; one for all or one a prompt. A response that long
            counts as finished.
        length_penalty: a response's score is its log-probability over ``length ** length_penalty``:
            0 compares probabilities, 1 the mean of a token, above 1 favours long responses.
        stop_tokens: ids that end a response, for all prompts or one sequence each; the tokenizer's
            end-of-sequence if None.
        n: responses to return, at most ``num_beams``.
        policy: log-probabilities are those of its proposal; such as forbid or favour tokens make
            sense here. The model's own if None.
        early: end a search when no live beam would beat the K-th finished response were it to end
            at its present length, as is common. By default it goes on for as long as a longer
            response could; they differ only where ``length_penalty`` is above 0.

    Raises:
        InputError: as of :func:`jaxalope.generate`, or a setting out of range; names it.
    """
    if num_beams < 1:
        raise InputError(f"num_beams={num_beams} must be at least 1")
    if not 1 <= n <= num_beams:
        raise InputError(f"n={n} must lie in 1..num_beams={num_beams}")
    if not np.isfinite(length_penalty):
        raise InputError(f"length_penalty={length_penalty} must be a finite number")
    batch = make_batch(model, prompts, policy, max_new_tokens, 0, stop_tokens)
    rows = np.repeat(np.arange(len(batch.lengths), dtype=np.int32), num_beams)
    reader = program_of(model, NextToken, ())
    searcher = program_of(model, BeamSearch, num_beams, early)
    many = batch.take(rows)
    state = read_prompts(model, reader, batch, many, rows, needs=batch.policy.needs)
    with model.context():
        state = searcher.search(
            model.params, many.policy, state, many.stop_tokens, jnp.float32(length_penalty)
        )
    return _result(model, batch, jax.device_get(state.pool), num_beams, n)


def _result(model: Model, batch: Batch, pool: Pool, num_beams: int, n: int) -> BeamResult:
    found: dict[str, list] = {field.name: [] for field in dataclasses.fields(BeamResult)}
    for i in range(batch.count):
        rows = range(i * num_beams, i * num_beams + n)
        rows = [row for row in rows if pool.score[row] > -np.inf]
        tokens = [pool.tokens[row, batch.lengths[i] : pool.length[row]] for row in rows]
        spoken = [t[~np.isin(t, batch.stop_tokens[i])].tolist() for t in tokens]
        decode = (lambda _: "") if model.tokenizer is None else model.tokenizer.decode
        found["tokens"].append(tokens)
        found["text"].append([decode(t) for t in spoken])
        found["scores"].append([float(pool.score[row]) for row in rows])
        found["logprobs"].append([float(pool.logprob[row]) for row in rows])
        found["finish_reasons"].append([FINISH_REASONS[pool.reason[row]] for row in rows])
    return BeamResult(**found)
