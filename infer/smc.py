"""Sequential Monte Carlo for ``p ** alpha``: particles are weighted, and copied by their weight.

``N`` responses grow side by side, drawn from a proposal ``q`` (low temperature). Each carries the
weight ``p ** alpha / q`` of what it has drawn; once few carry most of it, all are drawn anew in
proportion, and the copies go on apart. Only whole rows of the state are moved, so a recurrent cache
is as good as one addressed by position.

Source: "Power-SMC" (arXiv 2602.10273), algorithm 1 and appendix B. With a ladder of exponents the
text after ``t`` tokens is weighted for ``p ** a_t``, where ``a_t`` rises to alpha: the end is the
same, but fewer particles are given up early.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..errors import InputError
from ..model.handle import Model
from ..sharding import Params, constrain
from .cache import CacheLayout
from .driver import decoder_of
from .loop import DecodeState, run
from .next_token import commit, context_of, draw, forward, row_keys
from .policy import COLDEST, Temperature
from .programs import program_of, read_prompts
from .records import log_prob_of
from .request import Batch, integer, is_finite
from .rows import is_single
from .samples import PowerSamples, collect


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Particles:
    """``G`` sets of ``N`` particles: row ``g * N + i`` of the state is particle ``i`` of set ``g``.

    What is of a set or its particles lies on every device, so a set may straddle a mesh's shares.

    Attributes:
        state: of all particles.
        steps: tokens drawn so far in each row that still runs.
        log_weight: ``[G, N]``; the weights of a set have the mean 1.
        log_evidence: ``[G]``, the logarithm of the product of the means taken out of the weights.
        exponent: ``[G]``, of the law that the particles are weighted for.
        decoded: ``[G]``, tokens drawn.
        resamplings: ``[G]``.
    """

    state: DecodeState
    steps: Int[Array, ""]
    log_weight: Float[Array, "G N"]
    log_evidence: Float[Array, "G"]
    exponent: Float[Array, "G"]
    decoded: Int[Array, "G"]
    resamplings: Int[Array, "G"]

    @property
    def done(self) -> Bool[Array, "B"]:
        """Rows that have ended."""
        return self.state.done


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a run's numbers are; all are traced.

    Attributes:
        exponents: ``[L]``: of the law that a text of ``t + 1`` tokens is weighted for; the last is
            alpha, and stays.
        temperatures: ``[L]``, of the proposal for token ``t``.
        threshold: particles are resampled when their effective sample size is below this share of
            ``N``.
        every: tokens between two occasions to.
    """

    exponents: Any
    temperatures: Any
    threshold: Any
    every: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """One particle of each set, drawn by weight, and what the set was worth; all ``[G, ...]``.

    Attributes:
        state: the particles', without caches and keys.
        log_evidence: of ``sum(p ** alpha)``; its exponential is unbiased.
        effective_sample_size: ``1 / sum(w ** 2)`` of the last weights.
        decoded, resamplings: of the set.
    """

    state: DecodeState
    log_evidence: Any
    effective_sample_size: Any
    decoded: Any
    resamplings: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ParticleFilter:
    """The compiled particle filter of one model structure. Keep it: a new one compiles again.

    Attributes:
        graphdef: the model's structure.
        num_particles: of a set.
    """

    graphdef: nnx.GraphDef
    num_particles: int

    @functools.cached_property
    def run(self):
        """Jitted ``(params, state, seeds, samples, stop_tokens, schedule) -> (state, Chosen)``.

        ``state`` holds all particles, their prompts read, and is donated. ``seeds`` and ``samples``
        ``[G]`` are the sets'; ``stop_tokens`` ``[G * N, S]``.
        """
        return jax.jit(self._run, donate_argnums=1)

    def _run(
        self,
        params: Params,
        state: DecodeState,
        seeds: Int[Array, "G"],
        samples: Int[Array, "G"],
        stop_tokens: Int[Array, "B S"],
        schedule: Schedule,
    ) -> tuple[DecodeState, Chosen]:
        model = nnx.merge(self.graphdef, params)
        layout = CacheLayout.of(model, state.tokens.shape[1])
        # A set's own key: its first particle's, at a position that no token is ever drawn for.
        keys = row_keys(seeds, samples * self.num_particles)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        groups = seeds.shape[0]
        particles = Particles(
            state=state,
            steps=jnp.int32(0),
            log_weight=jnp.zeros((groups, self.num_particles)),
            log_evidence=jnp.zeros(groups),
            exponent=jnp.full(groups, schedule.exponents[0]),
            decoded=jnp.zeros(groups, jnp.int32),
            resamplings=jnp.zeros(groups, jnp.int32),
        )

        def step(particles: Particles) -> Particles:
            particles = self._grow(model, layout, particles, stop_tokens, schedule)
            return self._resample(layout, particles, keys, schedule)

        particles = run(step, particles)
        return particles.state, self._choose(particles, keys, schedule)

    def _grow(self, model, layout, particles: Particles, stop_tokens, schedule) -> Particles:
        """One more token in every row that runs, and the weights for it."""
        state = particles.state
        place = jnp.minimum(particles.steps, schedule.exponents.shape[0] - 1)
        said, cache = forward(model, layout, state)
        proposal = Temperature(schedule.temperatures[place])
        token, logits, _ = draw(proposal, said.logits, context_of(state), state.key)
        log_p, log_q = log_prob_of(said.logits, token), log_prob_of(logits, token)

        running = self._sets(~state.done)
        active = jnp.any(running, axis=1)
        exponent = jnp.where(active, schedule.exponents[place], particles.exponent)
        gain = exponent[:, None] * self._sets(log_p) - self._sets(log_q)
        particles = self._weigh(particles, jnp.where(running, gain, 0), exponent)
        state = dataclasses.replace(state, cache=cache)
        return dataclasses.replace(
            particles,
            state=commit(state, token, stop_tokens, {"logprob": log_p}),
            steps=particles.steps + 1,
            decoded=particles.decoded + jnp.sum(running, axis=1),
        )

    def _weigh(self, particles: Particles, gain, exponent) -> Particles:
        """Weights multiplied by ``exp(gain)`` and moved on to a law of another exponent."""
        so_far = self._sets(jnp.sum(particles.state.records["logprob"], axis=1))
        gain = gain + (exponent - particles.exponent)[:, None] * so_far
        log_weight = particles.log_weight + gain
        mean = jax.nn.logsumexp(log_weight, axis=1) - math.log(self.num_particles)
        return dataclasses.replace(
            particles,
            log_weight=log_weight - mean[:, None],
            log_evidence=particles.log_evidence + mean,
            exponent=exponent,
        )

    def _resample(self, layout, particles: Particles, keys: PRNGKeyArray, schedule) -> Particles:
        """The sets whose weights have become uneven, drawn anew; not those that have ended."""
        count, state = self.num_particles, particles.state
        log_weight = particles.log_weight
        due = effective_sample_size(log_weight) < schedule.threshold * count
        due &= jnp.any(self._sets(~state.done), axis=1)
        due &= particles.steps % schedule.every == 0
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, particles.steps)
        parents = systematic(jnp.exp(log_weight), jax.vmap(jax.random.uniform)(keys))
        parents = jnp.where(due[:, None], parents, jnp.arange(count))
        rows = (jnp.arange(len(parents))[:, None] * count + parents).reshape(-1)

        def copied(state: DecodeState) -> DecodeState:
            # Keys stay with their rows, so that copies of one particle draw different tokens.
            return dataclasses.replace(state.take(layout, rows), key=state.key)

        return dataclasses.replace(
            particles,
            state=jax.lax.cond(jnp.any(due), copied, lambda state: state, state),
            log_weight=jnp.where(due[:, None], 0, log_weight),
            resamplings=particles.resamplings + due,
        )

    def _choose(self, particles: Particles, keys: PRNGKeyArray, schedule) -> Chosen:
        """One particle of each set; a ladder that was not climbed to its end is, first."""
        exponent = jnp.full_like(particles.exponent, schedule.exponents[-1])
        particles = self._weigh(particles, 0, exponent)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        choice = jax.vmap(jax.random.categorical)(keys, particles.log_weight)
        rows = jnp.arange(len(choice)) * self.num_particles + choice
        text = dataclasses.replace(particles.state, cache=(), key=())
        return Chosen(
            state=jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim)[rows], text),
            log_evidence=particles.log_evidence,
            effective_sample_size=effective_sample_size(particles.log_weight),
            decoded=particles.decoded,
            resamplings=particles.resamplings,
        )

    def _sets(self, x: Array) -> Array:
        """``[G, N]`` of ``[G * N]``, on every device."""
        return constrain(x, None).reshape(-1, self.num_particles)


def effective_sample_size(log_weight: Float[Array, "G N"]) -> Float[Array, "G"]:
    """``sum(w) ** 2 / sum(w ** 2)``: from 1 (one has it all) to ``N`` (all weigh the same)."""
    total = jax.nn.logsumexp(log_weight, axis=1)
    return jnp.exp(2 * total - jax.nn.logsumexp(2 * log_weight, axis=1))


def systematic(weight: Float[Array, "G N"], u: Float[Array, "G"]) -> Int[Array, "G N"]:
    """Which particle each place gets: particle ``i`` gets ``N * w_i`` places, rounded up or down.

    Args:
        weight: of the particles, of any scale.
        u: one uniform number a set.
    """
    count = weight.shape[1]
    total = jnp.cumsum(weight, axis=1)
    total = total / total[:, -1:]
    points = (u[:, None] + jnp.arange(count)) / count
    search = functools.partial(jnp.searchsorted, side="right", method="compare_all")
    # The last point may round to 1.
    return jnp.minimum(jax.vmap(search)(total, points), count - 1).astype(jnp.int32)


def exponents_of(alpha: float, ladder: int | Sequence[float] | None) -> np.ndarray:
    """``[L]`` float32: the exponent after each token; the last is alpha.

    Raises:
        InputError: the ladder does not climb, from 0 or more to at most alpha.
    """
    steps = ladder
    if ladder is None:
        steps = ()
    elif is_single(ladder):
        if integer("ladder", ladder) < 1:
            raise InputError(f"ladder={ladder} must be at least 1 token, or a list of exponents")
        steps = 1 + (alpha - 1) * np.arange(ladder) / ladder
    exponents = np.array([*steps, alpha], np.float32)
    if not (np.isfinite(exponents).all() and exponents[0] >= 0 and (np.diff(exponents) >= 0).all()):
        raise InputError(
            f"ladder={ladder} must rise from 0 or more, without a step back, to alpha={alpha}"
        )
    return exponents


def sample_smc(
    model: Model,
    batch: Batch,
    *,
    alpha: float,
    t_max: int,
    num_particles: int = 64,
    tau: float | None = None,
    resample_threshold: float = 0.5,
    resample_every: int = 1,
    ladder: int | Sequence[float] | None = None,
    n: int = 1,
) -> PowerSamples:
    """Draw from ``p ** alpha`` by particles: exact as their number grows.

    Decodes ``num_particles`` tokens for each that a sample has, in as many rows a sample; a prompt
    is read once.

    Args:
        model: whose p it is.
        batch: the prompts; its policy is not used.
        alpha: the exponent.
        t_max: tokens that a response may get, where the batch's own limit is not lower.
        num_particles: of each sample, ``N``.
        tau: temperature of the proposal; None is the best one, 1 over the exponent.
        resample_threshold: resample when the effective sample size falls below this share of
            ``N``. Above 1: at every occasion.
        resample_every: tokens between two occasions.
        ladder: exponents that the first tokens are weighted for, before alpha; an int is so many
            tokens of a linear rise from 1. Alpha from the first token on if None.
        n: samples of each prompt, each from particles of its own.

    Raises:
        InputError: a setting is out of range; names it.
    """
    if not (is_finite(alpha) and alpha > 0):
        raise InputError(f"alpha={alpha} must be a positive number")
    for name, value in (
        ("num_particles", num_particles),
        ("resample_every", resample_every),
        ("t_max", t_max),
        ("n", n),
    ):
        integer(name, value, 1)
    if not resample_threshold >= 0:
        raise InputError(f"resample_threshold={resample_threshold} must be 0 (never) or a share")
    exponents = exponents_of(alpha, ladder)
    temperatures = (
        np.full_like(exponents, tau) if tau is not None else 1 / np.maximum(exponents, 1e-3)
    )
    if not (np.isfinite(temperatures).all() and (temperatures > COLDEST).all()):
        raise InputError(
            f"tau={tau} with alpha={alpha}: the proposal's temperature must exceed {COLDEST}, for "
            "it has to draw every token that the model may"
        )
    schedule = Schedule(
        exponents,
        temperatures.astype(np.float32),
        np.float32(resample_threshold),
        np.int32(resample_every),
    )
    filtered = program_of(model, ParticleFilter, num_particles)
    sets, chosen = _run(model, batch, filtered, schedule, t_max, n)
    worth = chosen.effective_sample_size, chosen.log_evidence
    return collect(
        model,
        sets,
        chosen.state,
        tokens_decoded=chosen.decoded.sum(dtype=np.int64),
        effective_sample_size=worth[0][: sets.count],
        log_evidence=worth[1][: sets.count],
    )


def _run(
    model: Model, batch: Batch, program: ParticleFilter, schedule: Schedule, t_max: int, n: int
) -> tuple[Batch, Chosen]:
    """The sets of particles as a batch with one row each, and what came of them."""
    count, ways = program.num_particles, model.batch_ways()
    batch = dataclasses.replace(batch, limits=np.minimum(batch.limits, batch.lengths + t_max))
    # Whole sets fill a mesh's shares up, for what need be several of them.
    sets, rows = batch.repeat(n, ways // math.gcd(ways, count))
    place = np.repeat(np.arange(len(rows)), count)
    samples = sets.samples[place] * count + np.tile(np.arange(count), len(rows))
    many = dataclasses.replace(sets.take(place), samples=samples.astype(np.int32))
    state = read_prompts(model, decoder_of(model), batch, many, rows[place])
    with model.context():
        _, chosen = program.run(
            model.params, state, sets.seeds, sets.samples, many.stop_tokens, schedule
        )
    return sets, jax.device_get(chosen)
