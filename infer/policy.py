"""Decoding policies: from next-token logits to the distribution that the next token is drawn from.

A policy is a small frozen dataclass, hashable, and a pytree: its numbers are traced and its shape
(which stages, in which order) is static, so that a compiled loop serves every temperature. It maps
float32 logits ``[B, V]`` to float32 logits ``[B, V]`` of the proposal; the loop draws from it. A
number may be one value for all rows or an array ``[B]``; :func:`stack_rows` builds such a policy
from one policy a row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..errors import InputError

# Temperatures up to this one take the most likely token.
COLDEST = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """How often each token occurs: in the prompt and in what was generated, ``[B, V]`` int32."""

    prompt: Any
    output: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a policy may look at beside the logits.

    Attributes:
        tokens: the canvas ``[B, T]``; positions from ``length`` on mean nothing.
        length: ``[B]``, the position that the logits are for.
        prompt_length: ``[B]``.
        counts: where the policy :attr:`~Policy.needs` ``"counts"``, else None.
        predicted: ``(temperature [B], top_p [B])`` of the model's decoding heads, if it has them.
    """

    tokens: Any
    length: Any
    prompt_length: Any
    counts: Counts | None = None
    predicted: tuple[Any, Any] | None = None


class Policy:
    """One stage, or a :class:`Chain` of them.

    A subclass is a frozen dataclass decorated with :func:`policy`, and defines ``__call__``.

    Class attributes:
        deterministic: its proposal always has all its probability on one token.
        needs: what it reads of the :class:`Context`: ``"context"`` (the canvas), ``"counts"``,
            ``"predicted"``; or ``"chunks"`` where it is for models that draw whole chunks.
        can_starve: it may forbid every token.
        rank: its place in the usual order of stages.
    """

    deterministic: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    can_starve: ClassVar[bool] = False
    rank: ClassVar[int] = 0

    def __call__(
        self, logits: Float[Array, "B V"], context: Context | None = None
    ) -> Float[Array, "B V"]:
        """The proposal's logits; ``-inf`` forbids a token. All ``-inf`` stay all ``-inf``."""
        raise NotImplementedError

    def constrained(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits under hard constraints alone (a grammar): what is left where a row starves."""
        return logits

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InputError if the policy names a token that the vocabulary does not have."""

    @classmethod
    def neutral(cls) -> Policy:
        """The stage that changes nothing, for the rows of a batch that do not have it."""
        raise InputError(f"{cls.__name__} has no neutral form; give it to every prompt or to none")

    @classmethod
    def stack(cls, stages: Sequence[Policy]) -> Policy:
        """One stage whose numbers are arrays with a row for each of ``stages``.

        Raises:
            InputError: they differ in what is static.
        """
        structures = {jax.tree.structure(stage) for stage in stages}
        if len(structures) > 1:
            raise InputError(
                f"the prompts' policies differ in {cls.__name__}'s static settings: "
                f"{sorted(map(str, set(stages)))}; these must be the same for a whole batch"
            )
        return jax.tree.map(lambda *leaves: np.stack([_number(x) for x in leaves]), *stages)


def policy(*, static: Sequence[str] = ()):
    """Make a class a frozen dataclass and a pytree whose leaves are the fields not ``static``."""

    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in names if name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return decorate


def check(ok, name: str, value: Any, remedy: str) -> None:
    """Raise InputError unless ``value`` is a number, or an array of them, and each is ``ok``.

    Tracers and placeholders, which stand for numbers checked before, pass.
    """
    if not isinstance(value, str | bytes | complex | int | float | np.ndarray | np.generic | None):
        return
    try:
        fits = np.isrealobj(value) and np.all(ok(value))
    except TypeError:  # NumPy's, of what is no number.
        fits = False
    if not fits:
        shown = repr(value) if isinstance(value, str | bytes) else value
        raise InputError(f"{name}={shown} {remedy}")


def column(value: Any) -> Array:
    """A number, or one a row, to broadcast against ``[B, V]``."""
    return jnp.asarray(value)[..., None]


def one_hot_logits(chosen: Int[Array, "B"], vocab_size: int) -> Float[Array, "B V"]:
    """0 at the chosen token, ``-inf`` elsewhere."""
    return jnp.where(jnp.arange(vocab_size) == chosen[:, None], 0.0, -jnp.inf)


def best_of(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """0 at the argmax, ``-inf`` elsewhere; a row of which everything is forbidden has no best."""
    best = one_hot_logits(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jnp.where(logits > -jnp.inf, best, -jnp.inf)


def needed(context: Context | None, stage: Policy) -> Context:
    """``context``; an error where a stage that reads it was called without."""
    lacks = {name for name in stage.needs if getattr(context, name, context) is None}
    if lacks:
        names = {"predicted": "decoding heads", "counts": "counts of the tokens before"}
        what = names.get(min(lacks), "the tokens before")
        raise InputError(f"{type(stage).__name__} needs {what}; this model or call has none")
    return context


@policy()
class Greedy(Policy):
    """All probability on the most likely token (the first of equals)."""

    deterministic: ClassVar[bool] = True
    rank: ClassVar[int] = 60

    def __call__(self, logits, context=None):
        """0 at the argmax, ``-inf`` elsewhere."""
        return best_of(logits)


@policy()
class Temperature(Policy):
    """Probabilities proportional to ``p ** (1 / value)``: below 1 sharper, above 1 flatter.

    Up to 1e-5 it is :class:`Greedy`.
    """

    value: float = 1.0
    rank: ClassVar[int] = 60

    def __post_init__(self):
        check(
            lambda x: np.isfinite(x) & (np.asarray(x) >= 0),
            "temperature",
            self.value,
            "must be 0 (greedy) or a positive number",
        )

    @classmethod
    def neutral(cls) -> Temperature:
        """Temperature 1."""
        return cls(1.0)

    def __call__(self, logits, context=None):
        """Logits divided by the temperature."""
        return cool(logits, self.value)


def cool(logits: Float[Array, "B V"], temperature: Any) -> Float[Array, "B V"]:
    """Logits over a temperature (a number, or ``[B]``), greedy where it is at most 1e-5."""
    temperature = column(temperature).astype(logits.dtype)
    # By a temperature so high that its reciprocal is flushed to 0, -inf would be divided to NaN;
    # with a number in its place gradients of the temperature stay finite, too.
    forbidden = logits == -jnp.inf
    cooled = jnp.where(forbidden, 0, logits) / jnp.maximum(temperature, COLDEST)
    cooled = jnp.where(forbidden, -jnp.inf, cooled)
    return jnp.where(temperature > COLDEST, cooled, best_of(logits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, init=False)
class Chain(Policy):
    """Policies applied one after another, first to last."""

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy, **rebuilt):
        # JAX rebuilds the dataclass by its field's name.
        object.__setattr__(self, "policies", rebuilt.get("policies", policies))

    @property
    def deterministic(self) -> bool:
        """Whether one of the policies leaves a single token."""
        return any(policy.deterministic for policy in self.policies)

    @property
    def needs(self) -> frozenset[str]:
        """Everything that one of them reads."""
        return frozenset().union(*(policy.needs for policy in self.policies))

    @property
    def can_starve(self) -> bool:
        """Whether one of them may forbid every token, alone or with the others."""
        return any(policy.can_starve for policy in self.policies)

    def __call__(self, logits, context=None):
        """The last policy's logits."""
        for stage in self.policies:
            logits = stage(logits, context)
        return logits

    def constrained(self, logits):
        """What every stage's hard constraint leaves."""
        for stage in self.policies:
            logits = stage.constrained(logits)
        return logits

    def check_vocabulary(self, vocab_size):
        """Raise InputError if one of the policies names a token beyond the vocabulary."""
        for stage in self.policies:
            stage.check_vocabulary(vocab_size)


def stages(policy: Policy) -> tuple[Policy, ...]:
    """The stages of a policy, chains within chains opened."""
    if isinstance(policy, Chain):
        return tuple(stage for part in policy.policies for stage in stages(part))
    return (policy,)


def stack_rows(policies: Sequence[Policy]) -> Policy:
    """One policy for a batch, row ``i`` of which follows ``policies[i]``.

    Rows may have different stages: the result has all of them, in the usual order, and a row has
    the neutral form of those that are not its own. A row's proposal is then bit for bit what its
    own policy gives alone.

    Raises:
        InputError: rows whose stages do not go together: one out of the usual order, twice the
            same, or different static settings.
    """
    rows = [stages(policy) for policy in policies]
    kinds = [tuple(type(stage) for stage in row) for row in rows]
    if len(set(kinds)) > 1:
        # In a mixed batch greedy is the temperature 0: only numbers may differ between rows.
        rows = [
            tuple(Temperature(0.0) if isinstance(stage, Greedy) else stage for stage in row)
            for row in rows
        ]
        union = sorted({type(s) for row in rows for s in row}, key=lambda t: (t.rank, t.__name__))
        for row in rows:
            places = [union.index(type(stage)) for stage in row]
            if any(b <= a for a, b in itertools.pairwise(places)):
                raise InputError(
                    f"policy {Chain(*row)} cannot share a batch with policies of other stages: it "
                    f"repeats one or is out of the usual order {[t.__name__ for t in union]}; run "
                    "it alone, or give every prompt the same stages"
                )
        rows = [_filled(row, union) for row in rows]
    stacked = tuple(type(column[0]).stack(column) for column in zip(*rows, strict=True))
    return stacked[0] if len(stacked) == 1 else Chain(*stacked)


def _filled(row: tuple[Policy, ...], union: list[type[Policy]]) -> tuple[Policy, ...]:
    own = {type(stage): stage for stage in row}
    return tuple(own.get(kind) or kind.neutral() for kind in union)


def _number(value: Any) -> np.ndarray:
    """A policy's number in the dtype that devices use."""
    value = np.asarray(value)
    if value.dtype == np.bool_:
        return value
    if np.issubdtype(value.dtype, np.integer):
        # What is too large for a device stays large.
        bounds = np.iinfo(np.int32)
        return np.clip(value, bounds.min, bounds.max).astype(np.int32)
    return value.astype(np.float32)


def propose(
    policy: Policy, logits: Float[Array, "B V"], context: Context | None
) -> tuple[Float[Array, "B V"], Bool[Array, "B"]]:
    """The proposal's logits, and which rows starved: their policy forbade every token.

    A starved row gets all probability on the likeliest token that its hard constraint (a grammar)
    allows, or on the likeliest of all if that forbids every token too.
    """
    proposal = policy(logits, context)
    if not policy.can_starve:
        return proposal, jnp.zeros_like(logits[:, 0], dtype=bool)
    starved = ~jnp.any(proposal > -jnp.inf, axis=-1)
    allowed = policy.constrained(logits)
    allowed = jnp.where(jnp.any(allowed > -jnp.inf, axis=-1, keepdims=True), allowed, logits)
    fallback = one_hot_logits(jnp.argmax(allowed, axis=-1), logits.shape[-1])
    return jnp.where(starved[:, None], fallback, proposal), starved
