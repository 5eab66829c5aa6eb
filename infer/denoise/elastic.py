"""Elastic-Cache: masked diffusion where each layer's keys and values age until attention drifts.

A step asks for the leftmost masked positions, a window that slides; commits the sure ones; and
recomputes, beside them, what was committed before and the most attended tokens, whose attention
tells whether the rest of the canvas has become stale. What a step computes is
:mod:`.elastic_pass`; this file is the step of the shared loop.

Source: arXiv 2510.14973 and its released code (:class:`ElasticCache` says where ours differs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ...errors import InputError
from ...model.decoder import Decoder
from ...sharding import constrain, kernel_map
from ..policy import check, column, policy
from .elastic_pass import DRIFTS, Ask, each_layer, elastic_pass, init_memory
from .rules import Progress, Rule

_ROW = ("batch", None)


@policy(static=("window", "track_num", "block_caching", "drift", "exact"))
class ElasticCache:
    """Settings of the cache; the defaults are the released scripts'.

    With ``gamma=0`` nothing is computed anew after the first call, with ``gamma > 1`` everything
    above the first layer is in every call. Even that is not the same as no cache, as the first
    layer's outputs are as old as the last time they were asked for; ``exact=True`` is.

    Attributes:
        gamma: similarity of attention below which the layers above are refreshed.
        window: masked positions that are asked for, from the left.
        track_num: tokens whose attention each layer watches.
        block_caching: masked positions beyond the window are not computed in every step. Without
            it all are, and the window says which may be committed.
        drift: how attention before and now is compared, ``"heads"`` (the released code) or
            ``"keys"`` (the paper's formula); their values are not of one scale, see
            :func:`~.elastic_pass.elastic_pass`.
        exact: compute everything in every step.
    """

    gamma: Any = 0.9
    window: int = 16
    track_num: int = 1
    block_caching: bool = True
    drift: str = "heads"
    exact: bool = False

    def __post_init__(self):
        remedy = "must be a similarity: 0 never refreshes, above 1 always does"
        check(lambda x: np.isfinite(x) & (np.asarray(x) >= 0), "gamma", self.gamma, remedy)
        for name in ("window", "track_num"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if self.drift not in DRIFTS:
            raise InputError(f"drift={self.drift!r} is not one of {', '.join(DRIFTS)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ElasticState:
    """What the loop carries.

    Attributes:
        tokens: the canvas ``[B, T]``; what is never committed keeps the mask's id.
        length: ``[B]``, positions that belong to each row.
        masked: ``[B, T]``, positions still to be decoded.
        ended: ``[B]``, rows that committed an end token: nothing after it is decoded.
        tracked: ``[B, layers * track_num]``, tokens whose attention is watched; ``T`` is none.
        new: ``[B, window]``, what the last step committed; ``T`` is none.
        start: ``[B]``, the layer from which the last step computed every row.
        calls: ``[B]``, calls of the model that each row took part in.
        refreshed: ``[B]``, layers that computed every row, summed over calls; the first call counts
            one more than there are layers, as published.
        committed_at: ``[B, T]``, the call that committed each position; -1 for none.
        logprobs: ``[B, T]``, of the committed tokens, float32.
        memory: of the layers.
    """

    tokens: Any
    length: Any
    masked: Any
    ended: Any
    tracked: Any
    new: Any
    start: Any
    calls: Any
    refreshed: Any
    committed_at: Any
    logprobs: Any
    memory: Any

    @property
    def done(self) -> Bool[Array, "B"]:
        """Rows without a position to decode."""
        return ~jnp.any(self.masked, axis=1)

    def update_frequency(self, num_layers: int) -> Float[Array, "B"]:
        """The part of all layers' passes that computed every row, as published."""
        return self.refreshed / (num_layers * jnp.maximum(self.calls, 1))


def start_elastic(
    model: Decoder,
    canvas: Int[Array, "B T"],
    length: Int[Array, "B"],
    settings: ElasticCache,
) -> ElasticState:
    """The state before the first call: every mask's id within ``length`` is to be decoded."""
    canvas, length = constrain(canvas, *_ROW), constrain(length, "batch")
    batch, width = canvas.shape
    places = jnp.arange(width)
    masked = (canvas == model.config.mask_token_id) & (places < length[:, None])

    def rows(value, *shape, dtype=jnp.int32):
        axes = ("batch", *(None for _ in shape))
        return constrain(jnp.full((batch, *shape), value, dtype), *axes)

    return ElasticState(
        tokens=canvas,
        length=length,
        masked=masked,
        ended=rows(False, dtype=bool),
        tracked=rows(width, len(model.config.kinds) * settings.track_num),
        new=rows(width, settings.window),
        start=rows(0),
        calls=rows(0),
        refreshed=rows(0),
        committed_at=rows(-1, width),
        logprobs=rows(0.0, width, dtype=jnp.float32),
        memory=init_memory(model, batch, width, settings.track_num),
    )


def elastic_step(
    model: Decoder,
    settings: ElasticCache,
    rule: Rule,
    stop_tokens: Int[Array, "B S"],
    *,
    most: int,
) -> Callable[[ElasticState], ElasticState]:
    """The step that asks for the window, commits by ``rule``, and refreshes what has drifted.

    Args:
        model: see :func:`~.elastic_pass.elastic_pass`.
        settings: of the cache.
        rule: which positions of the window to commit; one without steps.
        stop_tokens: ids that end a row; -1 is none.
        most: masked positions that a row may have at first.
    """
    num_layers, beta = len(model.config.kinds), settings.window

    def step(state: ElasticState) -> ElasticState:
        running, width = ~state.done, state.tokens.shape[1]
        masked = _first(state.masked, beta if settings.block_caching else max(most, beta))
        window = masked[:, :beta]
        everything = jnp.full_like(state.calls, -1)
        start = everything
        if not settings.exact:
            start = jnp.where(state.calls == 0, everything, num_layers)
        places = jnp.arange(width)
        ask = Ask(
            tokens=state.tokens,
            exists=places < state.length[:, None],
            masked=state.masked,
            tracked=jnp.where(running[:, None], state.tracked, width),
            new=state.new,
            window=masked,
            start=jnp.where(running, start, num_layers),
            gamma=settings.gamma,
        )
        hidden, memory, start = elastic_pass(
            model, state.memory, ask, track_num=settings.track_num, drift=settings.drift
        )
        token, logprob = _likeliest(model, model.logits(hidden[:, :beta]))
        progress = Progress(state.calls, state.calls, state.calls)
        chosen = rule.select(logprob, window < width, progress)

        new = jnp.where(chosen, window, width)
        tokens = _put(state.tokens, new, token)
        left = _put(state.masked, new, jnp.zeros_like(chosen))
        stops = jnp.any(token[:, :, None] == stop_tokens[:, None], axis=2) & chosen
        end = jnp.min(jnp.where(stops, window, width), axis=1)
        end = jnp.where(state.ended, width, end)
        tracked = jnp.concatenate(each_layer(memory, model, "watched"), axis=1)
        return dataclasses.replace(
            state,
            tokens=tokens,
            masked=left & (places <= end[:, None]),
            ended=state.ended | jnp.any(stops, axis=1),
            tracked=_distinct(tracked, width),
            new=new,
            start=start,
            calls=state.calls + running,
            refreshed=state.refreshed + jnp.where(running, num_layers - start, 0),
            committed_at=_put(state.committed_at, new, column(state.calls) + 0 * new),
            logprobs=_put(state.logprobs, new, logprob),
            memory=memory,
        )

    return step


def _likeliest(
    model: Decoder, logits: Float[Array, "B W V"]
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
    """The likeliest token that is no mask, and its log-probability under the model."""
    logits = constrain(logits, "batch", None, None)
    is_mask = jnp.arange(logits.shape[-1]) == model.config.mask_token_id
    token = jnp.argmax(jnp.where(is_mask, -jnp.inf, logits), axis=-1).astype(jnp.int32)
    # Its odds, not 1 - p: near one a probability has no digits left to be compared by.
    mine = jnp.arange(logits.shape[-1]) == token[:, :, None]
    own = jnp.sum(jnp.where(mine, logits, 0.0), axis=-1, keepdims=True)
    others = jnp.sum(jnp.where(mine, 0.0, jnp.exp(logits - own)), axis=-1)
    return token, -jnp.log1p(others)


def _first(masked: Bool[Array, "B T"], count: int) -> Int[Array, "B count"]:
    """The first places of each row that are masked; the width is none."""
    width = masked.shape[1]
    places = jnp.sort(jnp.where(masked, jnp.arange(width), width), axis=1)
    places = jnp.pad(places, ((0, 0), (0, max(count - width, 0))), constant_values=width)
    return places[:, :count]


def _distinct(places: Int[Array, "B N"], none: int) -> Int[Array, "B N"]:
    """Each row's places sorted, each once."""
    places = jnp.sort(places, axis=1)
    repeated = jnp.pad(places[:, 1:] == places[:, :-1], ((0, 0), (1, 0)))
    return jnp.sort(jnp.where(repeated, none, places), axis=1)


def _put(x, places, new):
    """``x [B, T]`` with ``new`` at each row's places."""

    def put(x, places, new):
        rows = jnp.arange(x.shape[0])[:, None]
        return x.at[rows, places].set(new.astype(x.dtype), mode="drop")

    return kernel_map(put, (_ROW, _ROW, _ROW), _ROW)(x, places, new)
