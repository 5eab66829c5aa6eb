"""Unmasking rules: which of the masked positions a denoising step commits.

A rule is a small frozen dataclass, hashable, and a pytree, like a policy: its kind is static and
its numbers are traced, one for all rows or one a row ``[B]``. :meth:`Rule.select` is the whole
interface: scores and masks of ``W`` positions in, the positions to commit out. Of equal scores the
one further left goes first, so that a result is a function of the scores alone.

Scores (:attr:`Rule.score`) say how sure a position is; larger is surer. The confidence is the
*logarithm* of the drawn token's probability: near one, where most decisions fall, a probability in
float32 has long run out of digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ...errors import InputError
from ..policy import check, column, policy
from .schedules import SCHEDULES, reveal_step, share

SCORES = ("confidence", "margin", "entropy", "random", "leftmost")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """How far each row is in its block.

    Attributes:
        step: ``[B]``, steps of the block behind it.
        steps: ``[B]``, that a block has.
        masked: ``[B]``, masks that the block began with.
        uniform: ``[B, W]`` in [0, 1), new in every step; None where the rule draws nothing.
    """

    step: Any
    steps: Any
    masked: Any
    uniform: Any = None

    @property
    def quota(self) -> Int[Array, "B"]:
        """This step's share where a block's masks are spread evenly, the first steps one more."""
        step, steps = jnp.asarray(self.step), jnp.asarray(self.steps)
        return self.masked // steps + (step < self.masked % steps)


class Rule:
    """Which masked positions a step commits.

    A subclass is a frozen dataclass decorated with :func:`~..policy.policy`.

    Attributes:
        score: what :meth:`select` wants to see: ``"confidence"`` (log-probability of the drawn
            token), ``"margin"`` (of the two likeliest probabilities), ``"entropy"`` (negative),
            ``"random"`` or ``"leftmost"``.
        processed: scores are of the policy's proposal instead of the model's own distribution.
        draws: it reads :attr:`Progress.uniform`.
        has_steps: it reads the other fields of :class:`Progress`.
    """

    score: ClassVar[str] = "confidence"
    processed: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    has_steps: ClassVar[bool] = False

    def settle(self, masked: Bool[Array, "B W"], progress: Progress) -> Progress:
        """``progress`` at the next step that commits something; those before it change nothing."""
        del masked
        return progress

    def select(
        self, score: Float[Array, "B W"], masked: Bool[Array, "B W"], progress: Progress
    ) -> Bool[Array, "B W"]:
        """The positions to commit: some of ``masked``, at least one of a row that has any.

        Args:
            score: see :attr:`score`; what it is elsewhere than at ``masked`` means nothing.
            masked: the positions that may be committed.
            progress: as :meth:`settle` gave it.
        """
        raise NotImplementedError


def ranks(score: Float[Array, "B W"], masked: Bool[Array, "B W"]) -> Int[Array, "B W"]:
    """Each position's place by descending score among the row's ``masked``: 0, 1, ...

    Equal scores go from left to right, all that is not masked comes last.
    """
    order = jnp.lexsort((-score, ~masked), axis=-1)
    return jnp.argsort(order, axis=-1)


def take_top(
    score: Float[Array, "B W"], masked: Bool[Array, "B W"], count: Int[Array, "B"]
) -> Bool[Array, "B W"]:
    """The ``count`` highest scores of each row's ``masked``; all of them if there are fewer."""
    return masked & (ranks(score, masked) < jnp.asarray(count)[..., None])


@policy(static=("score", "schedule", "processed"))
class TopQuota(Rule):
    """The surest positions, as many as the steps' schedule says.

    LLaDA's ``low_confidence`` is ``TopQuota()``, its ``random`` is ``TopQuota("random")``;
    :func:`dream` gives Dream's.

    Attributes:
        score: see :class:`Rule`.
        schedule: ``"even"``, or by how much noise a step takes away: ``"linear"``, ``"poly2"``,
            ``"cosine"`` (rounded, as in dllm) or ``"dream"`` (rounded down). A step without a
            share costs no call of the model.
        temperature: of the choice among positions: they are drawn without replacement by
            ``softmax(score / temperature)``, with probabilities for the confidence; 0 takes the
            surest, as does a caller without random draws.
        processed: see :class:`Rule`.
    """

    score: str = "confidence"
    schedule: str = "even"
    temperature: Any = 0.0
    processed: bool = False
    has_steps: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def __post_init__(self):
        _check_name("score", self.score, SCORES)
        _check_name("schedule", self.schedule, ("even", *SCHEDULES))
        remedy = "must be 0 (the surest positions) or a positive number"
        check(lambda x: np.isfinite(x) & (np.asarray(x) >= 0), "alg_temp", self.temperature, remedy)

    def _quota(self, remaining, progress):
        if self.schedule == "even":
            return progress.quota
        part = share(self.schedule, progress.step, progress.steps)
        rounded = jnp.floor if self.schedule == "dream" else jnp.round
        quota = rounded(remaining * part).astype(jnp.int32)
        return jnp.where(progress.step + 1 >= progress.steps, remaining, quota)

    def settle(self, masked, progress):
        """Skips steps without a share."""
        if self.schedule == "even":
            return progress
        remaining = jnp.sum(masked, axis=-1)

        def idle(step):
            now = dataclasses.replace(progress, step=step)
            return (self._quota(remaining, now) == 0) & (remaining > 0)

        step = jax.lax.while_loop(lambda s: jnp.any(idle(s)), lambda s: s + idle(s), progress.step)
        return dataclasses.replace(progress, step=step)

    def select(self, score, masked, progress):
        """The quota's worth of the highest scores."""
        quota = self._quota(jnp.sum(masked, axis=-1), progress)
        if progress.uniform is None:
            return take_top(score, masked, quota)
        temperature = column(self.temperature).astype(score.dtype)
        sure = jnp.exp(score) if self.score == "confidence" else score
        noisy = sure / jnp.maximum(temperature, 1e-30) + gumbel(progress.uniform)
        # What is to come last comes last however much noise there is.
        score = jnp.where((temperature > 0) & (score > -jnp.inf), noisy, score)
        return take_top(score, masked, quota)


@policy(static=("score",))
class TopCount(Rule):
    """The surest ``count`` positions of every step; ``TopCount(1, "random")`` is first-hitting.

    Attributes:
        count: at least 1.
        score: see :class:`Rule`.
    """

    count: Any = 1
    score: str = "confidence"

    def __post_init__(self):
        _check_name("score", self.score, SCORES)
        remedy = "must be a whole number of tokens, at least 1"
        check(lambda n: (np.mod(n, 1) == 0) & (np.asarray(n) >= 1), "count", self.count, remedy)

    @property
    def draws(self) -> bool:
        """Only for random scores."""
        return self.score == "random"

    def select(self, score, masked, progress):
        """The ``count`` highest scores."""
        return take_top(score, masked, self.count)


@policy()
class Threshold(Rule):
    """Every position at least ``value`` sure, and the surest one always.

    Source: Fast-dLLM (arXiv 2505.22618), section 3.3.

    Attributes:
        value: a probability.
    """

    value: Any = 0.9

    def __post_init__(self):
        _check_share("threshold", self.value)

    def select(self, score, masked, progress):
        """``c >= value``."""
        sure = score >= jnp.log(column(self.value).astype(score.dtype))
        return masked & (sure | (ranks(score, masked) == 0))


@policy()
class Factor(Rule):
    """The ``r``-th surest while ``c_r >= 1 - value / (r + 1)``, and the surest one always.

    At 1 this is the bound under which taking the marginals' best tokens together is the best joint
    choice. Source: Fast-dLLM (arXiv 2505.22618), theorem 1.

    Attributes:
        value: positive; a larger one commits more.
    """

    value: Any = 1.0

    def __post_init__(self):
        remedy = "must be a positive number; 1 is the published bound"
        check(lambda x: np.isfinite(x) & (np.asarray(x) > 0), "factor", self.value, remedy)

    def select(self, score, masked, progress):
        """The longest run of the sorted confidences that satisfies the bound."""
        place = ranks(score, masked)
        doubt = column(self.value) / (place + 2)
        least = jnp.log1p(-jnp.minimum(doubt, 1.0))
        fails = masked & (score < least) & (place > 0)
        first = jnp.min(jnp.where(fails, place, place.shape[-1]), axis=-1, keepdims=True)
        return masked & (place < first)


@policy()
class Dynamic(Rule):
    """Every position more than ``value`` sure if these fill the step's quota, else the quota.

    SDAR's and LLaDA2's ``low_confidence_dynamic``.

    Attributes:
        value: a probability; 0.85 to 0.95 as published.
    """

    value: Any = 0.9
    has_steps: ClassVar[bool] = True

    def __post_init__(self):
        _check_share("threshold", self.value)

    def select(self, score, masked, progress):
        """All that is sure, or the surest."""
        sure = masked & (score > jnp.log(column(self.value).astype(score.dtype)))
        quota = jnp.maximum(progress.quota, 1)
        enough = jnp.sum(sure, axis=-1) >= quota
        return jnp.where(enough[:, None], sure, take_top(score, masked, quota))


@policy()
class EntropyBounded(Rule):
    """Positions of least entropy first, while their entropies add up to at most ``budget``.

    The least one always. Source: SDAR (arXiv 2510.06303).

    Attributes:
        budget: nats, not negative.
    """

    budget: Any = 0.1
    score: ClassVar[str] = "entropy"

    def __post_init__(self):
        remedy = "must be a number of nats, not negative"
        check(lambda x: np.isfinite(x) & (np.asarray(x) >= 0), "budget", self.budget, remedy)

    def select(self, score, masked, progress):
        """The longest run of sorted entropies within the budget."""
        place = ranks(score, masked)
        order = jnp.argsort(place, axis=-1)
        entropy = jnp.where(masked, jnp.maximum(-score, 0), 0)
        spent = jnp.cumsum(jnp.take_along_axis(entropy, order, axis=-1), axis=-1)
        spent = jnp.take_along_axis(spent, place, axis=-1)
        return masked & ((spent <= column(self.budget)) | (place == 0))


@policy(static=("schedule",))
class Independent(Rule):
    """Every position by itself, with the probability by which noise has gone since the last step.

    The reverse process itself: ``"linear"``, ``"poly2"`` and ``"cosine"`` are the ancestral sampler
    of MDLM and BD3-LM, ``"dream"`` is Dream's ``origin``. Steps in which a row would commit nothing
    are skipped, which leaves its law as it is.

    Attributes:
        schedule: of the noise.
    """

    schedule: str = "linear"
    score: ClassVar[str] = "leftmost"
    draws: ClassVar[bool] = True
    has_steps: ClassVar[bool] = True

    def __post_init__(self):
        _check_name("schedule", self.schedule, SCHEDULES)

    def _when(self, progress):
        """The step in which each position is committed, given that it is not yet."""
        step, steps = progress.step[:, None], progress.steps[:, None]
        return reveal_step(self.schedule, progress.uniform, step, steps)

    def settle(self, masked, progress):
        """The first step in which one of the positions is committed, kept beside what it drew."""
        when = jnp.where(masked, self._when(progress), jnp.iinfo(jnp.int32).max)
        first = jnp.min(when, axis=-1)
        step = jnp.where(jnp.any(masked, axis=-1), first, progress.step)
        # What was drawn belongs to the step before: 1 marks the positions that wait on.
        waits = jnp.where(when > first[:, None], 1.0, 0.0)
        return dataclasses.replace(progress, step=step, uniform=waits)

    def select(self, score, masked, progress):
        """What :meth:`settle` drew for this step."""
        return masked & (progress.uniform < 1)


def dream(algorithm: str, alg_temp: Any = 0.0) -> Rule:
    """Dream's rules by their published names: origin, maskgit_plus, topk_margin, entropy.

    Raises:
        InputError: another name.
    """
    scores = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
    _check_name("dream", algorithm, ("origin", *scores))
    if algorithm == "origin":
        return Independent("dream")
    return TopQuota(scores[algorithm], "dream", alg_temp, processed=True)


def stack_rules(rules: Sequence[Rule]) -> Rule:
    """One rule whose numbers have a row for each of ``rules``.

    Raises:
        InputError: they differ in kind or in what is static.
    """
    structures = {jax.tree.structure(rule) for rule in rules}
    if len(structures) > 1:
        raise InputError(
            f"the prompts' rules differ in kind: {sorted(map(str, set(rules)))}; a batch has one "
            "kind of rule, whose numbers may differ"
        )

    def stack(*leaves):
        return np.stack([np.asarray(x, np.float32) for x in leaves])

    return jax.tree.map(stack, *rules)


def gumbel(uniform: Float[Array, "..."]) -> Float[Array, "..."]:
    """Standard Gumbel noise of uniform draws in [0, 1)."""
    tiny = jnp.finfo(uniform.dtype).tiny
    return -jnp.log(-jnp.log(jnp.maximum(uniform, tiny)))


def _check_name(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"rule: {field}={value!r} is not one of {', '.join(known)}")


def _check_share(name: str, value: Any) -> None:
    remedy = "must be a probability above 0 and at most 1"
    check(lambda p: (np.asarray(p) > 0) & (np.asarray(p) <= 1), name, value, remedy)
