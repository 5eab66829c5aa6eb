"""The state of denoising: a canvas of tokens and masks, filled in block by block."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ...sharding import constrain, kernel_map
from ..loop import LENGTH, RUNNING, STOPPED

_ROW, _ROWS = ("batch",), ("batch", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Canvas:
    """Everything that denoising carries from step to step; compiled decoders donate it.

    Attributes:
        tokens: the canvas: prompt, masks or what was committed for them, then zeros.
        block_of: the block in which each position is filled in; -1 is none. Blocks are as many
            masks each as a block has room for, from left to right, so that a prompt's masks are
            blocks of their own; in block diffusion they are the model's blocks of positions.
        prompt_length: of each row.
        length: of each row's canvas; 0 is no row at all.
        limit: where a row's text ends: ``length``, but for what fills up a model's last block.
        block: that each row is in.
        asked: calls of the model in this block so far.
        step: the schedule's step that comes next in this block.
        begun: masks that this block began with.
        calls: calls of the model that each row took part in.
        reason: why a row ended: ``RUNNING``, ``STOPPED`` (nothing before a stop token is masked) or
            ``LENGTH``.
        starved: whether a row's policy ever forbade every token.
        key: one a row, from its request's seed alone.
        cache: of the keys and values, as the cache's kind has it.
        records: of each position: ``"step"``, the call in which it was committed (from 1 on; 0 is
            given, or still masked), and ``"confidence"``, the probability of its token then.
    """

    tokens: Int[Array, "B T"]
    block_of: Int[Array, "B T"]
    prompt_length: Int[Array, "B"]
    length: Int[Array, "B"]
    limit: Int[Array, "B"]
    block: Int[Array, "B"]
    asked: Int[Array, "B"]
    step: Int[Array, "B"]
    begun: Int[Array, "B"]
    calls: Int[Array, "B"]
    reason: Int[Array, "B"]
    starved: Bool[Array, "B"]
    key: PRNGKeyArray
    cache: Any
    records: dict[str, Array]

    @property
    def done(self) -> Bool[Array, "B"]:
        """Rows that have ended."""
        return self.reason != RUNNING

    @property
    def exists(self) -> Bool[Array, "B T"]:
        """Positions that belong to the row."""
        return jnp.arange(self.tokens.shape[1]) < self.length[:, None]


def begin(
    prompts: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    limit: Int[Array, "B"],
    key: PRNGKeyArray,
    *,
    mask: int,
    width: int,
    block_length: int,
    aligned: bool,
) -> Canvas:
    """Canvases on which nothing has been committed yet.

    Args:
        prompts: each first in its row; they may hold masks.
        prompt_length: of each.
        limit: length of each row, prompt and response; 0 for a row that is done from the start.
        key: one a row.
        mask: id of the mask.
        width: of the canvas.
        block_length: masks, or positions, of a block.
        aligned: blocks are those of the model, at multiples of ``block_length``; the last one is
            filled up.
    """
    prompts = constrain(prompts, *_ROWS)
    prompt_length, limit, key = (constrain(x, *_ROW) for x in (prompt_length, limit, key))
    place = jnp.arange(width)
    length = -(-limit // block_length) * block_length if aligned else limit
    tokens = jnp.pad(prompts, ((0, 0), (0, width - prompts.shape[1])))
    tokens = jnp.where(place < prompt_length[:, None], tokens, mask)
    tokens = jnp.where(place < length[:, None], tokens, 0)
    masked = (tokens == mask) & (place < length[:, None])
    if aligned:
        block_of = jnp.where(place < length[:, None], place // block_length, -1)
        # Blocks before the first mask are the prompt, read once.
        first = jnp.min(jnp.where(masked, place, width), axis=1)
        block = jnp.where(jnp.any(masked, axis=1), first // block_length, 0)
    else:
        block_of = jnp.where(masked, (jnp.cumsum(masked, axis=1) - 1) // block_length, -1)
        block = jnp.zeros_like(length)
    none = jnp.zeros_like(length)
    reason = jnp.where(jnp.any(masked, axis=1), RUNNING, LENGTH)
    return Canvas(
        tokens=constrain(tokens, "batch", "seq"),
        block_of=constrain(block_of.astype(jnp.int32), *_ROWS),
        prompt_length=prompt_length,
        length=length,
        limit=limit,
        block=constrain(block.astype(jnp.int32), *_ROW),
        asked=none,
        step=none,
        begun=jnp.sum(masked & (block_of == block[:, None]), axis=1, dtype=jnp.int32),
        calls=none,
        reason=constrain(reason.astype(jnp.int32), *_ROW),
        starved=none > 0,
        key=key,
        cache=(),
        records={
            "step": constrain(jnp.zeros(tokens.shape, jnp.int32), *_ROWS),
            "confidence": constrain(jnp.zeros(tokens.shape, jnp.float32), *_ROWS),
        },
    )


def places_of(
    chosen: Bool[Array, "B T"], width: int
) -> tuple[Int[Array, "B width"], Bool[Array, "B width"]]:
    """The first ``width`` chosen positions of each row, left to right, and which of them exist.

    Where a row has fewer, positions that do not exist follow; they are inside the canvas.
    """

    def local(chosen):
        size = chosen.shape[1]
        ordered = jnp.sort(jnp.where(chosen, jnp.arange(size), size), axis=1)[:, :width]
        ordered = jnp.pad(ordered, ((0, 0), (0, width - ordered.shape[1])), constant_values=size)
        return jnp.minimum(ordered, size - 1), ordered < size

    return kernel_map(local, (_ROWS,), (_ROWS, _ROWS))(chosen)


def asked_before(places: Int[Array, "B W"]) -> Int[Array, "B W"]:
    """Where shifted logits are of the tokens at ``places``; nothing predicts the first."""
    return jnp.maximum(places - 1, 0)


def at(x: Array, places: Int[Array, "B W"]) -> Array:
    """``x [B, T, ...]`` at each row's places, laid out as an activation where it is one."""

    def local(x, places):
        return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)

    axes = (*_ROWS, *("embed" for _ in x.shape[2:]))
    return kernel_map(local, (axes, _ROWS), axes)(x, places)


def put(x: Array, places: Int[Array, "B W"], new: Array, where: Bool[Array, "B W"]) -> Array:
    """``x [B, T]`` with ``new`` at the places ``where`` it is to be written."""

    def local(x, places, new, where):
        rows = jnp.arange(len(x))[:, None]
        return x.at[rows, jnp.where(where, places, x.shape[1])].set(new, mode="drop")

    return kernel_map(local, (_ROWS,) * 4, _ROWS)(x, places, new.astype(x.dtype), where)


def commit(
    state: Canvas,
    places: Int[Array, "B W"],
    token: Int[Array, "B W"],
    confidence: Float[Array, "B W"],
    chosen: Bool[Array, "B W"],
    stop_tokens: Int[Array, "B S"],
    mask: int,
) -> Canvas:
    """Write the chosen tokens, and end the rows that need no more.

    Args:
        state: rows that are done stay as they are.
        places: of the tokens.
        token: drawn at each of them.
        confidence: the probability of each, recorded.
        chosen: of ``places``, what to write.
        stop_tokens: a row ends where one of these is committed and nothing before it is masked.
        mask: id of the mask.
    """
    chosen = chosen & ~state.done[:, None]
    tokens = put(constrain(state.tokens, *_ROWS), places, token, chosen)
    calls = jnp.broadcast_to(state.calls[:, None], places.shape)
    records = {
        "step": put(state.records["step"], places, calls, chosen),
        "confidence": put(state.records["confidence"], places, confidence, chosen),
    }
    place = jnp.arange(tokens.shape[1])
    inside = place < state.limit[:, None]
    masked = (tokens == mask) & inside
    width = tokens.shape[1]
    first_mask = jnp.min(jnp.where(masked, place, width), axis=1)
    response = inside & (place >= state.prompt_length[:, None])
    stops = jnp.any(tokens[:, :, None] == stop_tokens[:, None, :], axis=-1) & response
    first_stop = jnp.min(jnp.where(stops, place, width), axis=1)
    stopped = first_stop < first_mask
    ended = jnp.where(stopped, STOPPED, jnp.where(first_mask < width, RUNNING, LENGTH))
    return dataclasses.replace(
        state,
        tokens=constrain(tokens, "batch", "seq"),
        records=records,
        reason=jnp.where(state.done, state.reason, ended).astype(jnp.int32),
    )


def masked_now(state: Canvas, mask: int) -> Bool[Array, "B T"]:
    """Positions of each row's block that are still masked."""
    tokens = constrain(state.tokens, *_ROWS)
    return (tokens == mask) & (state.block_of == state.block[:, None])


def enter_next(state: Canvas, rows: Bool[Array, "B"], mask: int) -> Canvas:
    """``rows`` go on to their next block."""
    block = state.block + rows
    moved = dataclasses.replace(state, block=block)
    begun = jnp.sum(masked_now(moved, mask), axis=1, dtype=jnp.int32)
    return dataclasses.replace(
        moved,
        asked=jnp.where(rows, 0, state.asked),
        step=jnp.where(rows, 0, state.step),
        begun=jnp.where(rows, begun, state.begun),
    )
