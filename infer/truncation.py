"""Stages that cut the tail of a distribution off: top-k, top-p, min-p, typical, AutoDeco's.

Each keeps at least one token of a row that has any, and changes no logit that it keeps: what is
left is renormalised by whoever draws. Numbers are one for all rows or ``[B]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..layers.decoding_heads import log_soft_mask
from .policy import Policy, check, cool, needed, policy
from .rows import per_row, row_map
from .selection import check_implementation, kth_largest, mass_reached, smallest_set, total

# Few, since each is a compilation.
_BOUNDS = 64, 1024


class _Selection(Policy):
    """A stage whose tokens are found by a sort or by a bisection."""

    implementation: str | None

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """As :meth:`Policy.stack`; rows that the stage leaves alone take the others' settings."""
        neutral = cls.neutral()
        chosen = {s.implementation for s in stages if s != neutral} or {neutral.implementation}
        if len(chosen) == 1:
            stages = [dataclasses.replace(s, implementation=next(iter(chosen))) for s in stages]
        return super().stack(stages)


@policy(static=("implementation", "bound"))
class TopK(_Selection):
    """The ``k`` most likely tokens, and all that tie with the last; 0, -1 or ``k >= V`` keep all.

    Attributes:
        k: how many.
        implementation: ``"sort"``, ``"bisect"``, or None to pick by vocabulary, bound and platform.
        bound: that no row's ``k`` exceeds, if known: only so many tokens are then ranked. Stacked
            rows get one, unless they bisect or one wants more than 1024.
    """

    k: Any
    implementation: str | None = None
    bound: int | None = None
    rank: ClassVar[int] = 70

    def __post_init__(self):
        check(
            lambda k: (np.mod(k, 1) == 0) & (np.asarray(k) >= -1),
            "top_k",
            self.k,
            "must be a whole number of tokens, or 0 to keep all",
        )
        check_implementation("TopK", self.implementation)
        if self.bound is not None:
            remedy = f"exceeds bound={self.bound}"
            check(lambda k: np.asarray(k) <= self.bound, "top_k", self.k, remedy)

    @classmethod
    def neutral(cls) -> TopK:
        """0, which keeps all."""
        return cls(0)

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """As :meth:`Policy.stack`, with the rows' bound."""
        stacked = super().stack([dataclasses.replace(stage, bound=None) for stage in stages])
        largest = int(np.max(stacked.k))
        if stacked.implementation == "bisect" or largest > _BOUNDS[-1]:
            return stacked
        return dataclasses.replace(stacked, bound=next(b for b in _BOUNDS if b >= largest))

    def __call__(self, logits, context=None):
        """Keeps ``l >= (the k-th largest l)``."""

        def keep(logits, k):
            size = logits.shape[-1]
            keys = logits.astype(jnp.float32)
            k = jnp.clip(k, 0, size).astype(jnp.int32)
            edge = kth_largest(keys, jnp.maximum(k, 1), self.implementation, self.bound)
            edge = jnp.where((k <= 0) | (k >= size), -jnp.inf, edge)
            return jnp.where(keys >= edge[:, None], logits, -jnp.inf)

        return row_map(keep, logits, per_row(self.k, len(logits)))


@policy(static=("implementation",))
class TopP(_Selection):
    """The fewest of the most likely tokens whose probabilities add up to ``p``; 1 keeps all.

    Of exact ties at the edge a sort keeps as few as are needed, highest ids first (as if tokens
    were removed from the bottom until too much would be); a bisection keeps all.

    Attributes:
        p: in (0, 1].
        implementation: ``"sort"``, ``"bisect"``, or None to pick by the vocabulary's size.
    """

    p: Any
    implementation: str | None = None
    rank: ClassVar[int] = 80

    def __post_init__(self):
        _check_share("top_p", self.p)
        check_implementation("TopP", self.implementation)

    @classmethod
    def neutral(cls) -> TopP:
        """1, which keeps all."""
        return cls(1.0)

    def __call__(self, logits, context=None):
        """Keeps the nucleus."""
        return row_map(self._keep, logits, per_row(self.p, len(logits)))

    def _keep(self, logits, p):
        kept = _nucleus(logits, p, self.implementation, spare="high")
        return jnp.where(kept, logits, -jnp.inf)


@policy()
class SoftTopP(Policy):
    """AutoDeco's differentiable top-p: damps tokens by how much mass is reached with them.

    A token up to which there is mass ``c`` is multiplied by ``exp(-sharpness max(c - p, 0))``, so
    the one that crosses ``p`` is damped already. Source: arXiv 2510.26697.

    Attributes:
        p: in (0, 1]; 1 keeps all.
        sharpness: of the edge; 30 as published.
    """

    p: Any
    sharpness: Any = 30.0
    rank: ClassVar[int] = 82

    def __post_init__(self):
        _check_share("soft_top_p", self.p)
        remedy = "must be a positive number; 30 is the published one"
        check(lambda x: np.isfinite(x) & (np.asarray(x) > 0), "sharpness", self.sharpness, remedy)

    @classmethod
    def neutral(cls) -> SoftTopP:
        """1, which keeps all."""
        return cls(1.0)

    def __call__(self, logits, context=None):
        """Logits of the damped probabilities."""
        numbers = (per_row(x, len(logits)) for x in (self.p, self.sharpness))
        return row_map(_damped, logits, *numbers)


@policy()
class MinP(Policy):
    """The tokens at least ``p`` times as likely as the likeliest; 0 keeps all.

    Attributes:
        p: in [0, 1].
    """

    p: Any
    rank: ClassVar[int] = 90

    def __post_init__(self):
        remedy = "must be between 0 (which keeps every token) and 1"
        check(lambda p: (np.asarray(p) >= 0) & (np.asarray(p) <= 1), "min_p", self.p, remedy)

    @classmethod
    def neutral(cls) -> MinP:
        """0, which keeps all."""
        return cls(0.0)

    def __call__(self, logits, context=None):
        """Keeps ``p_v >= min_p max p``."""
        p = jnp.asarray(self.p)[..., None]
        return jnp.where(_relative(logits) >= p, logits, -jnp.inf)


@policy(static=("implementation",))
class Typical(_Selection):
    """The tokens whose surprise is nearest to the entropy, as many as have ``mass``; 1 keeps all.

    Attributes:
        mass: in (0, 1].
        implementation: ``"sort"``, ``"bisect"``, or None to pick by the vocabulary's size.
    """

    mass: Any
    implementation: str | None = None
    rank: ClassVar[int] = 95

    def __post_init__(self):
        _check_share("typical", self.mass)
        check_implementation("Typical", self.implementation)

    @classmethod
    def neutral(cls) -> Typical:
        """1, which keeps all."""
        return cls(1.0)

    def __call__(self, logits, context=None):
        """Keeps the smallest ``|-log p - H|``."""

        def keep(logits, mass):
            weights = _relative(logits)
            far = _distances(logits, weights)
            kept = smallest_set(-far, weights, mass, self.implementation)
            return jnp.where(kept | (mass >= 1)[:, None], logits, -jnp.inf)

        return row_map(keep, logits, per_row(self.mass, len(logits)))


@policy(static=("soft", "implementation"))
class Predicted(_Selection):
    """AutoDeco: every token's own temperature and top-p, predicted by the model's decoding heads.

    Stands where temperature and top-p stand. Source: arXiv 2510.26697.

    Attributes:
        enabled: False leaves a row as it is.
        soft: damps as :class:`SoftTopP`, which is what training differentiates, instead of cutting.
        implementation: of the cut: ``"sort"``, ``"bisect"``, or None to pick by the vocabulary's
            size.
    """

    enabled: Any = True
    soft: bool = False
    implementation: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"predicted"})
    rank: ClassVar[int] = 62

    def __post_init__(self):
        check_implementation("Predicted", self.implementation)

    @classmethod
    def neutral(cls) -> Predicted:
        """Leaves rows as they are."""
        return cls(False)

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """As :meth:`Policy.stack`; rows that the stage leaves alone take the others' settings."""
        soft = {stage.soft for stage in stages if stage.enabled}
        if len(soft) == 1:
            stages = [dataclasses.replace(s, soft=next(iter(soft))) for s in stages]
        return super().stack(stages)

    def __call__(self, logits, context=None):
        """Logits over the predicted temperature, then cut at the predicted top-p."""
        temperature, top_p = needed(context, self).predicted

        def keep(logits, temperature, p, enabled):
            cooled = cool(logits, temperature)
            if self.soft:
                kept = _damped(cooled, p, jnp.full_like(p, 30.0))
            else:
                kept = _nucleus(cooled, p, self.implementation, spare="low")
                kept = jnp.where(kept, cooled, -jnp.inf)
            return jnp.where(enabled[:, None], kept, logits)

        batch = len(logits)
        rows = (per_row(x, batch) for x in (temperature, top_p, self.enabled))
        return row_map(keep, logits, *rows)


def _check_share(name: str, value: Any) -> None:
    remedy = "must be above 0 and at most 1 (1 keeps every token)"
    check(lambda p: (np.asarray(p) > 0) & (np.asarray(p) <= 1), name, value, remedy)


def _nucleus(
    logits: Float[Array, "B V"], p: Float[Array, "B"], implementation: str | None, *, spare: str
) -> Bool[Array, "B V"]:
    """The fewest of the most likely tokens with mass ``p``; all at 1."""
    weights = _relative(logits)
    return smallest_set(weights, weights, p, implementation, spare=spare) | (p >= 1)[:, None]


def _distances(logits: Float[Array, "B V"], weights: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """``|-log p - H|``; infinite where a token is forbidden or has no mass in float32."""
    whole = total(weights)
    surprise = jnp.where(weights > 0, jnp.log(whole) - _below_best(logits), jnp.inf)
    shares = jnp.where(weights > 0, weights * jnp.maximum(surprise, 0), 0)
    return jnp.abs(surprise - total(shares) / jnp.where(whole > 0, whole, 1))


def _damped(logits: Array, p: Float[Array, "B"], sharpness: Float[Array, "B"]) -> Array:
    # In logarithms: a sharp edge damps by more than a float32 can say, and would empty a row.
    damping = log_soft_mask(mass_reached(_relative(logits)), p[:, None], sharpness[:, None])
    damped = logits + damping.astype(logits.dtype)
    return jnp.where((p >= 1)[:, None] | (logits == -jnp.inf), logits, damped)


def _below_best(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits less their row's largest, float32; a row with nothing allowed stays ``-inf``."""
    logits = logits.astype(jnp.float32)
    best = jnp.max(logits, axis=-1, keepdims=True)
    return logits - jnp.where(best > -jnp.inf, best, 0)


def _relative(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Probabilities over the row's largest, float32."""
    return jnp.exp(_below_best(logits))
