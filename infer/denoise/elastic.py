"""Elastic-Cache: masked diffusion where each layer's keys and values age until attention drifts.

A step asks for the leftmost masked positions, a window that slides; commits the sure ones; and
recomputes, beside them, what was committed before and the most attended tokens, whose attention
tells whether the rest of the canvas has become stale. What a call computes is in
:mod:`.elastic_pass`; this file is the step of the shared loop.

Source: arXiv 2510.14973 and its released code; see docs/elastic_cache.md for where they differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from ...errors import InputError
from ...sharding import constrain
from ..loop import LENGTH, RUNNING, STOPPED
from ..policy import check
from ..request import integer
from .caches import NoCache
from .canvas import Canvas, asked_before, places_of, put
from .draw import Numbers, decide
from .elastic_pass import DRIFTS, Ask, each_layer, elastic_pass, init_memory
from .rules import Progress, Rule, Threshold


@dataclasses.dataclass(frozen=True)
class ElasticCache(NoCache):
    """Layers compute the whole canvas anew only where attention has drifted; an approximation.

    The defaults are the released scripts'. With ``gamma=0`` nothing is computed anew after the
    first call, with ``gamma > 1`` everything above the first layer is in every call. Even that is
    not decoding without a cache: the first layer's outputs are as old as the last time they were
    asked for. ``exact=True`` is.

    Attributes:
        gamma: similarity of attention below which the layers above are refreshed.
        window: masked positions that are asked for, from the left; there are no blocks.
        track_num: tokens whose attention each layer watches; all, where a canvas has no more.
        block_caching: masked positions beyond the window are not computed in every step. Without
            it all are, and the window says which may be committed.
        drift: how attention before and now is compared, ``"heads"`` (the released code) or
            ``"keys"`` (the paper's formula); their values are not of one scale, see
            :func:`~.elastic_pass.elastic_pass`.
        exact: compute everything in every step.
    """

    gamma: float | None = 0.9
    window: int = 16
    track_num: int = 1
    block_caching: bool = True
    drift: str = "heads"
    exact: bool = False
    name: ClassVar[str] = "elastic"
    slides: ClassVar[bool] = True

    def __post_init__(self):
        remedy = "must be a similarity: 0 never refreshes, above 1 always does"
        if self.gamma is not None:  # As where it is traced.
            check(lambda x: np.isfinite(x) & (np.asarray(x) >= 0), "gamma", self.gamma, remedy)
        for name in ("window", "track_num"):
            integer(name, getattr(self, name), 1)
        if self.drift not in DRIFTS:
            raise InputError(f"drift={self.drift!r} is not one of {', '.join(DRIFTS)}")

    def traced(self):
        """Gamma is a number like others: one compilation serves all."""
        return dataclasses.replace(self, gamma=None), self.gamma

    def default_rule(self) -> Rule:
        """What the published scripts commit by."""
        return Threshold(0.9)

    def begin(self, model, tokens, prompt):
        """Nothing is remembered yet."""
        del prompt
        batch, width = tokens.shape

        def rows(value, *shape):
            full = jnp.full((batch, *shape), value, jnp.int32)
            return constrain(full, "batch", *(None for _ in shape))

        return ElasticMemory(
            layers=init_memory(model, batch, width, self.track_num),
            tracked=rows(width, len(model.config.kinds) * self.track_num),
            new=rows(width, self.window),
            end=rows(width),
            start=rows(-1),
            refreshed=rows(0),
        )

    def own_step(self, model, layout, numbers):
        """See :func:`elastic_step`."""
        return elastic_step(model, self, layout, numbers)

    def update_frequency(self, state: Canvas, num_layers: int) -> np.ndarray:
        """The part of all layers' passes that computed a row's whole canvas, as published.

        The first call counts one pass more than there are layers.
        """
        (memory,) = state.cache
        return np.asarray(memory.refreshed) / (num_layers * np.maximum(np.asarray(state.calls), 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ElasticMemory:
    """What is remembered between steps. Places are positions; the canvas's width is none.

    Attributes:
        layers: of every layer, see :class:`~.elastic_pass.LayerMemory`.
        tracked: ``[B, layers * track_num]``, the tokens whose attention is watched.
        new: ``[B, window]``, what the last step committed.
        end: ``[B]``, a stop token; no mask after it is filled in.
        start: ``[B]``, the first layer that computed every position in the last call, 0 or less
            with the embedding, the number of layers for none.
        refreshed: ``[B]``, layers that computed every position, added up.
    """

    layers: Any
    tracked: Any
    new: Any
    end: Any
    start: Any
    refreshed: Any


def elastic_step(
    model: nnx.Module, kind: ElasticCache, layout: Any, numbers: Numbers
) -> Callable[[Canvas], Canvas]:
    """The step that asks for the window, commits by the rule, and refreshes what has drifted.

    Args:
        model: see :func:`~.elastic_pass.elastic_pass`.
        kind: settings; gamma is in ``numbers.cache``.
        layout: whose ``block_length`` is the most masks of a row.
        numbers: with a rule that has no steps.
    """
    num_layers, beta = len(model.config.kinds), kind.window
    asked = beta if kind.block_caching else max(beta, layout.block_length)

    def step(state: Canvas) -> Canvas:
        (memory,) = state.cache
        running = ~state.done
        tokens = constrain(state.tokens, "batch", None)
        width = tokens.shape[1]
        masked = _open(tokens, state, memory.end, layout.mask)
        inside, valid = places_of(masked, asked)
        window = jnp.where(valid, inside, width)
        # Shifted logits are asked for one place before; what is committed stands at its own.
        look = jnp.where(valid, asked_before(inside), width) if layout.shift else window
        start = jnp.full_like(state.calls, -1)
        if not kind.exact:
            start = jnp.where(state.calls == 0, start, num_layers)
        ask = Ask(
            tokens=tokens,
            exists=state.exists,
            masked=masked,
            tracked=jnp.where(running[:, None], memory.tracked, width),
            new=jnp.where(running[:, None], memory.new, width),
            window=look,
            start=jnp.where(running, start, num_layers),
            gamma=numbers.cache,
        )
        hidden, layers, start = elastic_pass(
            model, memory.layers, ask, track_num=kind.track_num, drift=kind.drift
        )
        logits = constrain(model.logits(hidden[:, :beta]), "batch", None, None)
        left = jnp.sum((tokens == layout.mask) & state.exists, axis=1)
        window, inside, valid = (x[:, :beta] for x in (window, inside, valid))
        token, confidence, chosen, _, starved = decide(
            numbers,
            logits,
            jnp.where(state.exists, tokens, layout.mask),
            state.prompt_length,
            inside,
            valid,
            jax.vmap(jax.random.fold_in)(state.key, left),
            Progress(state.step, numbers.steps, state.begun),
            mask=layout.mask,
        )
        stops = jnp.any(token[:, :, None] == numbers.stop_tokens[:, None], axis=2) & chosen
        stops &= inside >= state.prompt_length[:, None]
        end = jnp.min(jnp.where(stops, window, width), axis=1)
        tracked = jnp.concatenate(each_layer(layers, model, "watched"), axis=1)
        memory = ElasticMemory(
            layers=layers,
            tracked=_distinct(tracked, width),
            new=jnp.where(chosen, window, width),
            # Only the first step that commits a stop token sets it, as published.
            end=jnp.where(memory.end < width, memory.end, end),
            start=start,
            refreshed=memory.refreshed + jnp.where(running, num_layers - start, 0),
        )
        calls = state.calls + running
        at_call = jnp.broadcast_to(calls[:, None], inside.shape)
        tokens = put(tokens, inside, token, chosen)
        more = jnp.any(_open(tokens, state, memory.end, layout.mask), axis=1)
        ended = jnp.where(more, RUNNING, jnp.where(memory.end < width, STOPPED, LENGTH))
        return dataclasses.replace(
            state,
            tokens=constrain(tokens, "batch", "seq"),
            calls=calls,
            asked=state.asked + running,
            reason=jnp.where(running, ended, state.reason).astype(jnp.int32),
            starved=state.starved | (starved & running),
            records={
                "step": put(state.records["step"], inside, at_call, chosen),
                "confidence": put(state.records["confidence"], inside, confidence, chosen),
            },
            cache=(memory,),
        )

    return step


def _open(tokens, state: Canvas, end: Int[Array, "B"], mask: int) -> Bool[Array, "B T"]:
    """Positions that are still to be filled in."""
    before = jnp.arange(tokens.shape[1]) < end[:, None]
    return (tokens == mask) & state.exists & before & ~state.done[:, None]


def _distinct(places: Int[Array, "B N"], none: int) -> Int[Array, "B N"]:
    """Each row's places sorted, each once."""
    places = jnp.sort(places, axis=1)
    repeated = jnp.pad(places[:, 1:] == places[:, :-1], ((0, 0), (1, 0)))
    return jnp.sort(jnp.where(repeated, none, places), axis=1)
