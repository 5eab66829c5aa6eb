"""Where drafts come from: another model, or the row's own text.

A :class:`Draft` is what users give. Its :meth:`~Draft.start` checks it against the target model
and returns a :class:`Drafter`: a pytree whose arrays (parameters, a policy's numbers) are traced,
so that one compilation serves them all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from ..errors import InputError
from ..model.handle import Model
from ..model.registry import decoding_of
from ..sharding import Params, kernel_map
from .cache import CacheLayout
from .loop import DecodeState
from .next_token import commit, context_of, draw, forward
from .policy import Policy, stack_rows
from .request import check_policy, integer

# What a row's key is folded with beside positions, which count up from 0.
DRAFT, ACCEPT = 2**32 - 1, 2**32 - 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """Tokens proposed for each row's next positions.

    Attributes:
        tokens: ``[B, G]``.
        count: ``[B]``, how many of a row's are meant; the others are not looked at.
        logits: ``[G, B, V]``, the distribution that each was drawn from, given those before it;
            None where each had all the probability.
    """

    tokens: Any
    count: Any
    logits: Any = None


class Drafter(Protocol):
    """The device's part of a draft: a pytree. Its cache is addressed and kept as any model's is.

    Attributes:
        num_tokens: G, the drafts of a step.
        needs: what its policy reads of the context, as :attr:`~.policy.Policy.needs`.
    """

    num_tokens: int

    @property
    def needs(self) -> frozenset[str]:
        """See the class."""

    def init_cache(self, batch: int, max_length: int) -> Any:
        """As a model's; ``()`` if it remembers nothing."""

    def read(self, tokens: Int[Array, "B T"], cache: Any, segment_ids: Int[Array, "B T"]) -> Any:
        """The cache after these tokens, as a model's second result."""

    def draft(self, policy: Policy, state: DecodeState) -> tuple[Drafts, Any]:
        """Drafts for the positions after ``state``, by ``policy`` where it has none of its own.

        ``state.cache`` is the drafter's own, and so is the cache returned: it has read the last
        token and every draft. Rows that are done may be drafted for; nobody looks at it. What is
        drawn depends on ``aside(state.key, DRAFT)`` and positions alone.
        """


class Draft(Protocol):
    """What ``generate(..., draft=)`` takes.

    Attributes:
        num_tokens: drafts of a step.
    """

    num_tokens: int

    def start(self, model: Model) -> Drafter:
        """The drafter for this target.

        Raises:
            InputError: it does not fit the target.
        """


def aside(key: PRNGKeyArray, use: int) -> PRNGKeyArray:
    """Row keys for another use than a position's own draw: :data:`DRAFT` or :data:`ACCEPT`."""
    return jax.vmap(lambda k: jax.random.fold_in(k, jnp.uint32(use)))(key)


# -- A model ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Draws drafts from a smaller model with the same vocabulary.

    Attributes:
        model: any of the zoo that predicts next tokens; recurrent or not.
        policy: that it draws by; the target's if None.
        num_tokens: drafts of a step.
    """

    model: Model
    policy: Policy | None = None
    num_tokens: int = 4

    def __post_init__(self):
        _check_count("num_tokens", self.num_tokens)

    def start(self, model: Model) -> ModelDrafter:
        """The drafter; an InputError where it draws no next tokens, or for another vocabulary or
        on another mesh."""
        kind = decoding_of(self.model.config)
        if kind != "next_token":
            raise InputError(
                f"draft: its model={type(self.model.config).__name__} decodes by {kind!r}, and "
                "drafts are drawn token by token; draft with a model that predicts next tokens, or "
                "with PromptLookup()"
            )
        mine, theirs = self.model.config.vocab_size, model.config.vocab_size
        if mine != theirs:
            raise InputError(
                f"draft: its model has a vocabulary of {mine} and the target one of {theirs}; "
                "draft with a model that was trained with the target's tokenizer"
            )
        if self.model.mesh != model.mesh:
            raise InputError(
                f"draft: its model lies on the mesh {self.model.mesh} and the target on "
                f"{model.mesh}; load both on one"
            )
        policy = None
        if self.policy is not None:
            check_policy(self.model, self.policy)
            policy = stack_rows([self.policy])
        return ModelDrafter(self.model.params, policy, self.model.graphdef, self.num_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelDrafter:
    """The device's part of :class:`DraftModel`; ``policy`` has one row, or is None."""

    params: Params
    policy: Policy | None
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    num_tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def needs(self) -> frozenset[str]:
        """Of its own policy."""
        return frozenset() if self.policy is None else self.policy.needs

    def init_cache(self, batch: int, max_length: int) -> Any:
        """The model's."""
        return self._module().init_cache(batch, max_length)

    def read(self, tokens, cache, segment_ids) -> Any:
        """The model's cache after these tokens."""
        return self._module()(tokens, cache, segment_ids=segment_ids)[1]

    def draft(self, policy: Policy, state: DecodeState) -> tuple[Drafts, Any]:
        """One token after another, on a canvas of its own."""
        model, batch = self._module(), state.length.shape[0]
        layout = CacheLayout.of(model, state.tokens.shape[1])
        if self.policy is not None:
            policy = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (batch, *jnp.shape(x)[1:])), self.policy
            )
        if "predicted" in policy.needs and getattr(model, "decoding_heads", None) is None:
            raise InputError(
                "draft: its model has no decoding heads, which the policy reads; give DraftModel a "
                "policy of its own"
            )
        # Nothing ends a row of this canvas: what comes after an end is not looked at.
        state = dataclasses.replace(
            state,
            limit=jnp.full_like(state.limit, state.tokens.shape[1] + 1),
            reason=jnp.zeros_like(state.reason),
            key=aside(state.key, DRAFT),
            records={},
        )
        never = jnp.full((1, 1), -1)

        def draft_one(state, _):
            said, cache = forward(model, layout, state)
            context = context_of(state, said.predicted)
            token, proposal, _ = draw(policy, said.logits, context, state.key)
            state = commit(dataclasses.replace(state, cache=cache), token, never, {})
            return state, (token, proposal)

        state, (tokens, logits) = jax.lax.scan(draft_one, state, length=self.num_tokens)
        _, cache = forward(model, layout, state)
        count = jnp.full_like(state.length, self.num_tokens)
        return Drafts(tokens.T, count, logits), cache

    def _module(self) -> nnx.Module:
        return nnx.merge(self.graphdef, self.params)


# -- The row's own text ----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed the row's last tokens where they occurred before, prompt included.

    The longest match of up to ``ngram`` tokens, the latest of equally long ones; a continuation
    that reaches the row's end goes on from its beginning, so that a text in a cycle is drafted as
    such. It costs no model call and pays where a text repeats itself: code, quotations, edits.
    A row without a match is not drafted for.

    Attributes:
        num_tokens: drafts of a step.
        ngram: the longest match looked for.
    """

    num_tokens: int = dataclasses.field(default=4, metadata={"static": True})
    ngram: int = dataclasses.field(default=3, metadata={"static": True})

    def __post_init__(self):
        _check_count("num_tokens", self.num_tokens)
        _check_count("ngram", self.ngram)

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def start(self, model: Model) -> PromptLookup:
        """Itself: it fits every model."""
        return self

    def init_cache(self, batch: int, max_length: int) -> tuple:
        """It remembers nothing."""
        return ()

    def read(self, tokens, cache, segment_ids) -> tuple:
        """Nothing to read: the canvas holds it."""
        return cache

    def draft(self, policy: Policy, state: DecodeState) -> tuple[Drafts, tuple]:
        """What followed the match."""
        row = ("batch", None)
        find = kernel_map(self._find, (row, row[:1]), (row, row[:1]))
        return Drafts(*find(state.tokens, state.length)), ()

    def _find(
        self, tokens: Int[Array, "B T"], length: Int[Array, "B"]
    ) -> tuple[Int[Array, "B G"], Int[Array, "B"]]:
        width = tokens.shape[1]
        places, length = jnp.arange(width), length[:, None]
        # matched[b, c]: how many tokens before place c equal the row's last ones, up to ngram.
        running: Bool[Array, "B T"] = (places >= 1) & (places < length)
        matched = jnp.zeros_like(tokens)
        for back in range(1, self.ngram + 1):
            last = jnp.take_along_axis(tokens, jnp.maximum(length - back, 0), axis=1)
            before = jnp.pad(tokens, ((0, 0), (back, 0)))[:, :width]
            running = running & (before == last) & (places >= back)
            matched = matched + running
        best = jnp.argmax(matched * width + places, axis=1)[:, None]
        found = jnp.take_along_axis(matched, best, axis=1)[:, 0] > 0
        period = jnp.maximum(length - best, 1)
        source = jnp.minimum(best + jnp.arange(self.num_tokens) % period, width - 1)
        drafts = jnp.take_along_axis(tokens, source, axis=1)
        return drafts, jnp.where(found, self.num_tokens, 0).astype(length.dtype)


def _check_count(name: str, value: int) -> None:
    integer(f"draft: {name}", value, 1)
