"""Look-ahead for ``p ** alpha``: candidates are weighed by roll-outs of what can follow them.

Over whole responses the next token ``c`` has the law ``p(c) ** alpha * zeta(c)``, where zeta, the
sum of ``p ** alpha`` over all that can follow ``c``, is what low temperature leaves out. It is the
mean of ``p ** (alpha - 1)`` over continuations drawn from ``p``: roll-outs estimate it, and a
jackknife takes the leading bias out of the law that is made of the estimates.

Source: "Scalable power sampling" (arXiv 2601.21590), algorithms 1 and 2, equations 3 to 6.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..errors import InputError
from ..model.handle import Model
from ..sharding import Params, constrain, take_rows
from .cache import CacheLayout
from .generate import decoder_of
from .loop import DecodeState, run
from .next_token import commit, forward, next_token_step
from .policy import Temperature
from .programs import program_of, read_prompts
from .records import LogProb
from .request import Batch
from .samples import PowerSamples, collect

# Folded into a row's key before anything but the row's own next token is drawn: a position that no
# token is ever drawn for, then what the draw is for.
_ASIDE, _POOL, _ROLLOUTS = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """Texts, and the tokens drawn for each so far (``decoded [B]``), roll-outs included."""

    state: DecodeState
    decoded: Int[Array, "B"]

    @property
    def done(self) -> Bool[Array, "B"]:
        """Rows that have ended."""
        return self.state.done


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """``K`` ways to go on from each of ``B`` texts.

    Attributes:
        state: row ``b * K + k`` is text ``b`` with its candidate ``k`` committed.
        log_p: ``[B, K]``, of each candidate; ``-inf`` where there are fewer.
        decoded: ``[B]``, tokens drawn to find them.
    """

    state: DecodeState
    log_p: Float[Array, "B K"]
    decoded: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, eq=False)
class Lookahead:
    """The compiled look-ahead of one model structure. Keep it: a new one compiles again.

    Caches of ``num_candidates * num_rollouts`` rows a text exist at a time, beside one for each
    candidate (or member of the pool).

    Attributes:
        graphdef: the model's structure.
        num_candidates: weighed at every choice.
        num_rollouts: of each.
        block: tokens that a choice commits.
        pool: blocks drawn, of which the likeliest are the candidates, where ``block`` is above 1.
        jackknife: whether the law's leading bias is taken out.
    """

    graphdef: nnx.GraphDef
    num_candidates: int
    num_rollouts: int
    block: int = 1
    pool: int = 32
    jackknife: bool = True

    @functools.cached_property
    def run(self):
        """Jitted ``(params, state, stop_tokens [B, S], alpha, horizon) -> Search``.

        ``state`` has read its prompts and records ``logprob``; it is donated.
        """
        return jax.jit(self._run, donate_argnums=1)

    def _run(
        self,
        params: Params,
        state: DecodeState,
        stop_tokens: Int[Array, "B S"],
        alpha: Float[Array, ""],
        horizon: Int[Array, ""],
    ) -> Search:
        model = nnx.merge(self.graphdef, params)
        layout = CacheLayout.of(model, state.tokens.shape[1])
        propose = self._tokens if self.block == 1 else self._blocks

        def step(search: Search) -> Search:
            state = search.state
            candidates = propose(model, layout, state, stop_tokens)
            futures, decoded = self._futures(
                model, layout, state, candidates, stop_tokens, alpha, horizon
            )
            law = choice_law(candidates.log_p, futures, alpha, self.jackknife)
            keys = constrain(jax.vmap(jax.random.fold_in)(state.key, state.length), None)
            choice = jax.vmap(jax.random.categorical)(keys, law)
            rows = jnp.arange(law.shape[0]) * law.shape[1] + choice
            chosen = candidates.state.take(layout, rows)
            decoded = search.decoded + constrain(candidates.decoded + decoded, "batch")
            return Search(dataclasses.replace(chosen, key=state.key), decoded)

        return run(step, Search(state, jnp.zeros_like(state.length)))

    def _tokens(self, model, layout, state: DecodeState, stop_tokens) -> Candidates:
        """The likeliest next tokens."""
        said, cache = forward(model, layout, state)
        log_p, ids = _likeliest(jax.nn.log_softmax(said.logits), self.num_candidates)
        rows = _copies(state.length, log_p.shape[1])
        forked = dataclasses.replace(state, cache=cache).take(layout, rows)
        token, logprob = (constrain(x.reshape(-1), "batch") for x in (ids, log_p))
        forked = commit(forked, token, take_rows(stop_tokens, rows), {"logprob": logprob})
        return Candidates(forked, log_p, constrain((~state.done).astype(jnp.int32), None))

    def _blocks(self, model, layout, state: DecodeState, stop_tokens) -> Candidates:
        """The likeliest of a pool of blocks, drawn from the model; each block once."""
        drawn, log_p, decoded = self._continue(
            model, layout, state, state, stop_tokens, self.pool, self.block, _POOL
        )
        log_p = jnp.where(self._repeated(drawn, state), -jnp.inf, log_p)
        log_p, places = _likeliest(log_p, self.num_candidates)
        rows = jnp.arange(log_p.shape[0])[:, None] * self.pool + places
        chosen = drawn.take(layout, rows.reshape(-1))
        limit = take_rows(state.limit, _copies(state.length, log_p.shape[1]))
        return Candidates(chosen.with_limit(limit), log_p, decoded)

    def _repeated(self, drawn: DecodeState, state: DecodeState) -> Bool[Array, "B L"]:
        """Which blocks of a pool occur before in it."""
        places = jnp.arange(drawn.tokens.shape[1])
        start = take_rows(state.length, _copies(state.length, self.pool))[:, None]
        block = jnp.minimum(start + jnp.arange(self.block), len(places) - 1)
        block = jnp.take_along_axis(drawn.tokens, block, axis=1)
        # What follows a short block's end is not part of it, though it looks like a token.
        block = constrain(jnp.concatenate([block, drawn.length[:, None]], axis=1), None, None)
        block = block.reshape(-1, self.pool, block.shape[1])
        same = jnp.all(block[:, :, None] == block[:, None], axis=-1)
        return jnp.any(same & jnp.tri(self.pool, k=-1, dtype=bool), axis=2)

    def _futures(
        self, model, layout, state: DecodeState, candidates: Candidates, stops, alpha, horizon
    ) -> tuple[Float[Array, "B K M"], Int[Array, "B"]]:
        """Logs of estimates of every candidate's zeta, and the tokens drawn for them.

        0 where the candidate has ended: nothing follows, and zeta is 1.
        """
        _, log_p, decoded = self._continue(
            model,
            layout,
            state,
            candidates.state,
            stops,
            self.num_rollouts,
            horizon,
            _ROLLOUTS,
        )
        shape = (*candidates.log_p.shape, self.num_rollouts)
        return (alpha - 1) * log_p.reshape(shape), decoded

    def _continue(
        self, model, layout, text: DecodeState, state: DecodeState, stops, count, length, purpose
    ) -> tuple[DecodeState, Float[Array, "B R"], Int[Array, "B"]]:
        """``count`` continuations of every row of ``state``, drawn from the model itself.

        Args:
            model, layout: as usual.
            text: that ``state`` has equally many rows for each row of; its keys are used.
            state: what to continue.
            stops: of the rows of ``text``.
            count: continuations of each row.
            length: tokens that one may get.
            purpose: sets their keys apart.

        Returns:
            The continuations, their log p and, for each text, the tokens drawn.
        """
        rows = _copies(state.length, count)
        drawn = state.take(layout, rows)
        start = drawn.length
        each = len(rows) // text.length.shape[0]
        of = _copies(text.length, each)
        keys = _aside(text, purpose)
        place = constrain(jnp.arange(len(of)) % each, "batch")
        keys = jax.vmap(jax.random.fold_in)(take_rows(keys, of), place)
        drawn = dataclasses.replace(drawn, key=keys)
        drawn = drawn.with_limit(jnp.minimum(drawn.limit, start + length))
        step = next_token_step(model, Temperature(1.0), layout, take_rows(stops, of), (LogProb(),))
        drawn = run(step, drawn)
        new = jnp.arange(drawn.tokens.shape[1]) >= start[:, None]
        log_p = jnp.sum(jnp.where(new, drawn.records["logprob"], 0), axis=1)
        log_p, decoded = (
            constrain(x, None).reshape(-1, each) for x in (log_p, drawn.length - start)
        )
        return drawn, log_p, jnp.sum(decoded, axis=1)


def choice_law(
    log_p: Float[Array, "B K"],
    log_zeta: Float[Array, "B K M"],
    alpha: float | Float[Array, ""],
    jackknife: bool = True,
) -> Float[Array, "B K"]:
    """Log-probabilities of the candidates under ``p ** alpha * zeta``, zeta being estimated.

    With one estimate (``M = 1``), as for the exact zeta, it is the normalised product. Of several
    the mean is taken, and the jackknife ``M * law - (M - 1) * (mean law without one)`` has a bias
    of order ``1 / M ** 2`` instead of ``1 / M``; what it makes negative is set to 0.

    Args:
        log_p: of the candidates; ``-inf`` where there is none, not all of a row.
        log_zeta: ``M`` independent unbiased estimates for each, as logarithms; finite.
        alpha: positive.
        jackknife: whether to correct.
    """
    count = log_zeta.shape[-1]

    def law(log_zeta):
        return jax.nn.log_softmax(alpha * log_p[..., None] + log_zeta, axis=-2)

    # A mean's constant factor cancels.
    plain = law(jax.nn.logsumexp(log_zeta, axis=-1, keepdims=True))
    if not jackknife or count == 1:
        return plain[..., 0]
    others = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, log_zeta[..., None, :])
    without = jnp.exp(law(jax.nn.logsumexp(others, axis=-1)))
    corrected = count * jnp.exp(plain[..., 0]) - (count - 1) * jnp.mean(without, axis=-1)
    corrected = jnp.maximum(corrected, 0)
    return jnp.log(corrected) - jnp.log(jnp.sum(corrected, axis=-1, keepdims=True))


def _copies(rows: Array, count: int) -> Int[Array, "R"]:
    """Each row's number, ``count`` times."""
    return jnp.repeat(jnp.arange(rows.shape[0]), count)


def _likeliest(log_p: Float[Array, "B V"], count: int) -> tuple[Array, Array]:
    """The ``count`` largest of each row (all, if there are fewer) and where they stand.

    In the order in which they stand, and on every device. So a choice among all tokens draws what
    a policy over the vocabulary would.
    """
    log_p, places = jax.lax.top_k(log_p, min(count, log_p.shape[1]))
    places, log_p = jax.lax.sort((places, log_p), dimension=1, num_keys=1)
    return constrain(log_p, None, None), constrain(places, None, None)


def _aside(state: DecodeState, purpose: int) -> PRNGKeyArray:
    """Keys of the rows for draws that are not their own next token."""

    def key(key, length):
        for data in (_ASIDE, purpose, length):
            key = jax.random.fold_in(key, data)
        return key

    return jax.vmap(key)(state.key, state.length)


def sample_lookahead(
    model: Model,
    batch: Batch,
    *,
    alpha: float,
    t_max: int,
    num_candidates: int = 8,
    num_rollouts: int = 8,
    block: int = 1,
    pool: int | None = None,
    horizon: int | None = None,
    jackknife: bool = True,
    n: int = 1,
) -> PowerSamples:
    """Draw from ``p ** alpha`` over the likeliest candidates, as roll-outs estimate it.

    Exact in the limit of many roll-outs to the end, if all tokens are candidates. For every token
    (or block) of a sample it decodes up to ``num_candidates * num_rollouts`` continuations to their
    end or the horizon, in as many rows; so a response of ``T`` tokens costs about
    ``num_candidates * num_rollouts * T * min(T / 2, horizon) / block``. A prompt is read once.

    Args:
        model: whose p it is.
        batch: the prompts; its policy is not used.
        alpha: the exponent.
        t_max: tokens that a response may get, where the batch's own limit is not lower.
        num_candidates: the likeliest tokens, or blocks of a pool, of which one is chosen. With as
            many as the vocabulary nothing is left out.
        num_rollouts: of each candidate.
        block: tokens committed by a choice. Above 1 the candidates are the likeliest of blocks
            drawn from the model, and the choice is among those drawn: not exact, even at alpha 1.
        pool: blocks drawn to find the candidates, for ``block`` above 1; 4 a candidate if None.
        horizon: tokens of a roll-out; None to the response's end. 0 is temperature ``1 / alpha``.
        jackknife: whether the leading bias of few roll-outs is taken out.
        n: samples of each prompt.

    Raises:
        InputError: a setting is out of range; names it.
    """
    pool = 4 * num_candidates if pool is None else pool
    horizon = batch.capacity if horizon is None else horizon
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"alpha={alpha} must be a positive number")
    for name, value, least in (
        ("t_max", t_max, 1),
        ("num_candidates", num_candidates, 1),
        ("num_rollouts", num_rollouts, 1),
        ("block", block, 1),
        ("horizon", horizon, 0),
        ("n", n, 1),
    ):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    if block > 1 and pool < num_candidates:
        raise InputError(f"pool={pool} must be at least num_candidates={num_candidates}")
    settings = num_candidates, num_rollouts, block, pool, jackknife
    search = program_of(model, Lookahead, *settings)
    batch = dataclasses.replace(batch, limits=np.minimum(batch.limits, batch.lengths + t_max))
    many, rows = batch.repeat(n, model.batch_ways())
    state = read_prompts(model, decoder_of(model), batch, many, rows)
    with model.context():
        found = search.run(
            model.params, state, many.stop_tokens, jnp.float32(alpha), jnp.int32(horizon)
        )
    decoded = jax.device_get(found.decoded)[: many.count]
    return collect(model, many, found.state, tokens_decoded=decoded.sum(dtype=np.int64))
