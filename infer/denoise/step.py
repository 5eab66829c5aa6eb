"""The denoising step of the shared loop, and its compiled functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...sharding import Params, constrain
from ..loop import run
from ..next_token import row_keys
from .caches import Ask, NoCache
from .canvas import Canvas, asked_before, at, begin, commit, enter_next, masked_now, places_of
from .draw import Numbers, decide
from .rules import Progress


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is static of a denoising run.

    Attributes:
        mask: id of the mask.
        block_length: masks, or positions, of a block.
        blocks: that a row may have, at most.
        width: of the canvas.
        aligned: blocks are the model's own.
        shift: logits at a position are of the next one's token.
        scattered: masks of a block need not stand side by side.
        guided: classifier-free guidance is used.
    """

    mask: int
    block_length: int
    blocks: int
    width: int
    aligned: bool = False
    shift: bool = False
    scattered: bool = False
    guided: bool = False

    def reads(self, count: int) -> int:
        """Places that ``count`` masks are computed at, with those before them if logits shift."""
        if not self.shift:
            return count
        return min(2 * count if self.scattered else count + 1, self.width)


def ask_logits(
    model: nnx.Module, kind: NoCache, layout: Layout, state: Canvas, ask: Ask, numbers: Numbers
) -> tuple[Float[Array, "B W V"], tuple]:
    """Logits of the token at each asked place, guided if that is asked for; and the caches."""

    def one(tokens, cache):
        hidden, cache = kind.read(model, dataclasses.replace(ask, tokens=tokens), cache, layout)
        return constrain(model.logits(hidden), "batch", None, None), cache

    if not layout.guided:
        logits, cache = one(ask.tokens, state.cache[0])
        return logits, (cache,)
    conditional, cache = one(ask.tokens, state.cache[0])
    free, other = one(blanked(state, layout.mask), state.cache[1])
    scale = numbers.guidance[:, None, None] + 1
    return free + scale * (conditional - free), (cache, other)


def blanked(state: Canvas, mask: int) -> Int[Array, "B T"]:
    """The canvas without its prompt: what guidance takes the logits away from.

    What was filled in of the prompt's masks stays.
    """
    place = jnp.arange(state.tokens.shape[1])
    given = (place < state.prompt_length[:, None]) & (state.records["step"] == 0)
    return jnp.where(given, mask, constrain(state.tokens, "batch", None))


def denoise_step(
    model: nnx.Module, kind: NoCache, layout: Layout, numbers: Numbers
) -> Callable[[Canvas], Canvas]:
    """The step that commits some of the masked positions of every running row's block."""
    mask = layout.mask

    def step(state: Canvas) -> Canvas:
        running = ~state.done
        masked = masked_now(state, mask)
        open_rows = jnp.any(masked, axis=1) & running
        # Every row that is read takes part: it commits something, or its block is stored.
        takes_part = running if kind.stores else open_rows
        here = state.block_of == state.block[:, None]
        places, valid = places_of(here, layout.block_length)
        later = (state.block_of >= state.block[:, None]) & state.exists
        look, own, own_valid = places, places, valid
        if layout.shift:
            # A token is asked for one place before its own, where nothing of the block may stand.
            look = asked_before(places)
            own, own_valid = places_of(_with_before(here), layout.reads(layout.block_length))
            later = _with_before(later)
        tokens = constrain(state.tokens, "batch", None)
        ask = Ask(
            tokens=tokens,
            exists=state.exists,
            places=look,
            own=own,
            valid=own_valid,
            later=later,
            block=jnp.max(jnp.where(running, state.block, 0)),
            fresh=jnp.any(open_rows & (state.asked == 0)),
        )
        logits, cache = ask_logits(model, kind, layout, state, ask, numbers)
        # Of what is left, which every step that draws makes less: calls that only store, and so
        # the kind of cache, change no draw.
        left = jnp.sum((tokens == mask) & state.exists, axis=1)
        keys = jax.vmap(jax.random.fold_in)(state.key, left)
        state = dataclasses.replace(
            state,
            cache=cache,
            calls=state.calls + takes_part,
            asked=state.asked + takes_part,
        )
        place_masked = valid & (at(masked, places)) & open_rows[:, None]
        token, confidence, chosen, taken, starved = decide(
            numbers,
            logits,
            jnp.where(state.exists, tokens, mask),
            state.prompt_length,
            places,
            place_masked,
            keys,
            Progress(state.step, numbers.steps, state.begun),
            mask=mask,
        )
        state = dataclasses.replace(
            state,
            step=jnp.where(open_rows, taken + 1, state.step),
            starved=state.starved | (starved & open_rows),
        )
        state = commit(state, places, token, confidence, chosen, numbers.stop_tokens, mask)
        finished = ~jnp.any(masked_now(state, mask), axis=1)
        if kind.stores:
            return enter_next(state, ~state.done & running & ~open_rows, mask)
        moves = ~state.done & finished
        if kind.together:
            moves = moves & jnp.all(finished | state.done)
        return enter_next(state, moves, mask)

    return step


def _with_before(chosen: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """The chosen positions, and the one before each."""
    return chosen | jnp.pad(chosen[:, 1:], ((0, 0), (0, 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """The compiled denoising decoder of one model structure, kind of cache and layout.

    Holds the compiled functions, so keep it: a new one compiles again. Policies, rules and all
    numbers are traced.

    Attributes:
        graphdef: the model's structure.
        kind: of cache.
        layout: what is static.
    """

    graphdef: nnx.GraphDef
    kind: NoCache
    layout: Layout

    @functools.cached_property
    def begin(self):
        """Jitted ``(params, prompts [B, P], lengths, limits, seeds, samples) -> Canvas``."""

        def run_begin(params: Params, prompts, lengths, limits, seeds, samples) -> Canvas:
            model, layout = nnx.merge(self.graphdef, params), self.layout
            state = begin(
                prompts,
                lengths,
                limits,
                row_keys(seeds, samples),
                mask=layout.mask,
                width=layout.width,
                block_length=layout.block_length,
                aligned=layout.aligned,
            )
            tokens = constrain(state.tokens, "batch", None)
            read = state.exists & (state.block_of >= 0) & (state.block_of < state.block[:, None])
            caches = [self.kind.begin(model, tokens, read)]
            if layout.guided:
                caches.append(self.kind.begin(model, blanked(state, layout.mask), read))
            return dataclasses.replace(state, cache=tuple(caches))

        return jax.jit(run_begin)

    @functools.cached_property
    def decode(self):
        """Jitted ``(params, numbers, state, max_steps) -> state``; donates it."""

        def run_decode(params: Params, numbers: Numbers, state: Canvas, max_steps) -> Canvas:
            model = nnx.merge(self.graphdef, params)
            step = self.kind.own_step(model, self.layout, numbers)
            step = step or denoise_step(model, self.kind, self.layout, numbers)
            return run(step, state, max_steps)

        return jax.jit(run_decode, donate_argnums=2)
