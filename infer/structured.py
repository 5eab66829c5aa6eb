"""Structured output: a grammar's masks are made on the host while the device reads.

A step is cut in two. The device reads each row's last token; meanwhile the host asks every row's
matcher what may follow, and packs the answers into words; then the device draws under that mask.
Where only one continuation is possible for several tokens, these are read in one call instead.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..errors import InputError
from ..model.handle import Model
from ..sharding import Params, constrain
from .cache import CacheLayout
from .constraints import GrammarMask
from .defaults import stop_ids
from .driver import Run
from .grammar import Grammar, Vocabulary
from .loop import RUNNING, STOPPED, DecodeState
from .next_token import (
    Forward,
    NextToken,
    commit,
    context_of,
    draw_and_commit,
    forward,
    last_token,
)
from .policy import Chain, Policy, one_hot_logits, propose, stages

# Forced tokens read in one call; longer chains take several.
_FORCED = 16


Grammars = Any  # One spec or compiled grammar for all prompts, or a sequence with None among them.


@dataclasses.dataclass(frozen=True, eq=False)
class Guided(NextToken):
    """The compiled decoder whose step a host takes part in."""

    @functools.cached_property
    def forward(self):
        """Jitted ``(params, state) -> (Forward, state)``: read the last tokens; donates it."""

        def run_forward(params: Params, state: DecodeState) -> tuple[Forward, DecodeState]:
            model = self.bind(params)
            layout = CacheLayout.of(model, state.tokens.shape[1])
            said, cache = forward(model, layout, state)
            return said, dataclasses.replace(state, cache=cache)

        return jax.jit(run_forward, donate_argnums=1)

    @functools.cached_property
    def draw(self):
        """Jitted ``(policy, state, Forward, stop_tokens, ended, starved) -> (state, tokens)``.

        Rows that have ``ended`` draw nothing more. ``tokens [B]`` are each row's last. Donates the
        state.
        """

        def run_draw(policy, state, said, stop_tokens, ended, starved):
            reason = jnp.where(ended & ~state.done, STOPPED, state.reason).astype(jnp.int32)
            state = dataclasses.replace(state, reason=reason, starved=state.starved | starved)
            state = draw_and_commit(policy, state, said, stop_tokens, self.records)
            return state, last_token(state)[:, 0]

        return jax.jit(run_draw, donate_argnums=1)

    @functools.cached_property
    def force(self):
        """Jitted ``(params, policy, state, tokens [B, 16], count [B], stop_tokens) -> state``.

        Commits ``count`` given tokens a row, which the model reads in one call. Donates the state.
        """
        return jax.jit(self._force, donate_argnums=2)

    def _force(
        self,
        params: Params,
        policy: Policy,
        state: DecodeState,
        tokens: Int[Array, "B G"],
        count: Int[Array, "B"],
        stop_tokens: Int[Array, "B S"],
    ) -> DecodeState:
        model = self.bind(params)
        count = jnp.where(state.done, 0, jnp.minimum(count, state.limit - state.length))
        inside = jnp.arange(tokens.shape[1]) < count[:, None]
        before = jnp.concatenate([last_token(state), tokens[:, :-1]], axis=1)
        logits, cache = model(
            jnp.where(inside, before, 0), state.cache, segment_ids=inside.astype(jnp.int32)
        )
        logits = constrain(logits, "batch", None, None)
        state = dataclasses.replace(state, cache=cache)
        # Those that only cut keep the one token that there is.
        forbidding = Chain(*(stage for stage in stages(policy) if stage.can_starve))
        for i in range(tokens.shape[1]):
            proposal = one_hot_logits(tokens[:, i], logits.shape[-1])
            recorded = {r.name: r.value(logits[:, i], proposal, tokens[:, i]) for r in self.records}
            forced = jnp.where(proposal > -jnp.inf, logits[:, i], -jnp.inf)
            _, starved = propose(forbidding, forced, context_of(state))
            starved = state.starved | (starved & inside[:, i] & ~state.done)
            state = dataclasses.replace(state, starved=starved)
            state = commit(state, tokens[:, i], stop_tokens, recorded, active=inside[:, i])
        return state


class GuidedRun(Run):
    """A batch some rows of which follow grammars.

    A row whose grammar allows no token ends there: as usual where its text is complete, and with
    ``starved`` set where it leads nowhere.
    """

    def __init__(self, *args, grammars: Sequence[Grammar | None], n: int, **kwargs):
        super().__init__(*args, n=n, **kwargs)
        rows = [grammar for grammar in grammars for _ in range(n)]
        self._matchers = [None if grammar is None else grammar.matcher() for grammar in rows]
        # A mesh's extra rows follow none.
        self._matchers += [None] * (len(self.batch.lengths) - len(rows))
        width = -(-self.model.config.vocab_size // 32)
        self._words = np.zeros((len(self._matchers), width), np.int32)
        self._enabled = np.array([matcher is not None for matcher in self._matchers])
        self._lengths = self.batch.lengths.copy()
        self._live = self.batch.limits > self.batch.lengths

    def decode(self, state: DecodeState, max_steps: int) -> DecodeState:
        """The device's part of :meth:`advance`, with the host's between."""
        params, stops = self.model.params, self.batch.stop_tokens
        for _ in range(max_steps):
            if not self._live.any():
                break
            said, state = self.decoder.forward(params, state)
            ended, starved, forced = self._masks()  # While the device reads.
            policy = _with_mask(self.batch.policy, GrammarMask(self._words, self._enabled))
            state, drawn = self.decoder.draw(policy, state, said, stops, ended, starved)
            if any(forced):
                tokens, count = _padded(forced)
                state = self.decoder.force(params, self.batch.policy, state, tokens, count, stops)
            drawn, lengths, reasons = jax.device_get((drawn, state.length, state.reason))
            self._accept(drawn, forced, lengths)
            self._live = reasons == RUNNING
        return state

    def _masks(self) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
        """Fill the rows' words; which rows have ended, which starved, and what is forced next."""
        ended, starved = np.zeros((2, len(self._words)), bool)
        forced: list[list[int]] = [[] for _ in self._words]
        for i, matcher in enumerate(self._matchers):
            if matcher is None or not self._live[i]:
                continue
            matcher.mask(self._words[i])
            if not self._words[i].any():
                ended[i], starved[i] = True, not matcher.is_done
            elif _single(self._words[i]):
                # The first of them is drawn under the mask like any token.
                forced[i] = matcher.forced_tokens()[1 : _FORCED + 1]
        return ended, starved, forced

    def _accept(self, drawn: np.ndarray, forced: list[list[int]], lengths: np.ndarray) -> None:
        """Move the matchers on by what was committed."""
        for i, matcher in enumerate(self._matchers):
            if matcher is not None:
                committed = [int(drawn[i]), *forced[i]][: lengths[i] - self._lengths[i]]
                for token in committed:
                    matcher.accept(token)
        self._lengths = lengths


def _with_mask(policy: Policy, mask: GrammarMask) -> Chain:
    """The policy with the mask at its usual place."""
    parts = list(stages(policy))
    place = next((i for i, part in enumerate(parts) if part.rank > mask.rank), len(parts))
    return Chain(*parts[:place], mask, *parts[place:])


def _single(words: np.ndarray) -> bool:
    """Whether exactly one bit is set."""
    (filled,) = np.nonzero(words)
    if len(filled) != 1:
        return False
    bits = int(words[filled[0]]) & 0xFFFFFFFF
    return bits & (bits - 1) == 0


def _padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(rows), _FORCED), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def compiled_grammars(model: Model, grammar: Grammars, count: int) -> list[Grammar | None]:
    """A compiled grammar (or None) for each of ``count`` prompts.

    Args:
        model: whose tokenizer's bytes the grammars run over.
        grammar: a spec or a compiled grammar for all, or one each (None for none).
        count: prompts.

    Raises:
        InputError: there is no tokenizer, another number of grammars, or a wrong grammar.
    """
    grammars = list(grammar) if isinstance(grammar, list | tuple) else [grammar] * count
    if len(grammars) != count:
        raise InputError(f"grammar has {len(grammars)} entries for {count} prompts; give one each")
    compiled: dict[int, Grammar] = {}
    for one in grammars:
        if one is None or id(one) in compiled:
            continue
        if not (hasattr(one, "compile") or hasattr(one, "matcher")):
            likely = {str: "Regex", dict: "JsonSchema"}.get(type(one))
            remedy = f"grammar.{likely}(...)" if likely else "grammar.Json(), grammar.Regex(...)"
            raise InputError(f"grammar={one!r} is no grammar; give {remedy}")
        if not hasattr(one, "compile"):
            compiled[id(one)] = one
            continue
        if model.tokenizer is None:
            raise InputError("grammar needs a tokenizer; this model has none")
        compiled[id(one)] = one.compile(_vocabulary(model))
    return [None if one is None else compiled[id(one)] for one in grammars]


# Kept as long as their model is: reading a large vocabulary takes longer than a grammar does.
_VOCABULARIES: weakref.WeakKeyDictionary[Model, Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary(model: Model) -> Vocabulary:
    if model not in _VOCABULARIES:
        vocabulary, stops = Vocabulary.from_tokenizer(model.tokenizer), stop_ids(model)
        # A text ends by a token that the model was taught to end texts by.
        if stops and vocabulary.eos_id not in stops:
            vocabulary = dataclasses.replace(vocabulary, eos_id=stops[0])
        _VOCABULARIES[model] = vocabulary
    return _VOCABULARIES[model]
