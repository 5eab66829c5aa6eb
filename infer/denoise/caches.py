"""What a denoising step computes anew, and what it remembers of the calls before.

A kind of cache is a small frozen dataclass, static in a compiled step. Its :meth:`~NoCache.read` is
one call of the model for every row: normalised activations at the asked places, and the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...sharding import constrain, kernel_map
from .canvas import at, places_of
from .rules import Rule, TopQuota

_ROWS = ("batch", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ask:
    """What a step asks of the model.

    Attributes:
        tokens: the canvas ``[B, T]``, as the model is to see it.
        exists: ``[B, T]``, positions that belong to the row.
        places: ``[B, W]``, where the answer is wanted; with shifted logits, one before each token.
        own: ``[B, R]``, the block's positions and ``places``, from left to right: what is computed
            of the block. Without a shift both are the same.
        valid: ``[B, R]``, which of ``own`` exist.
        later: ``[B, T]``, positions filled in now or in a later block, and where these are asked.
        block: the block that all running rows are in, where they go together.
        fresh: whether it begins.
    """

    tokens: Any
    exists: Any
    places: Any
    own: Any
    valid: Any
    later: Any
    block: Any
    fresh: Any


@dataclasses.dataclass(frozen=True)
class NoCache:
    """Every call reads the whole canvas; each row is in a block of its own.

    Class attributes:
        name: by which it is asked for.
        together: rows enter a block together: those that are through wait for the others.
        stores: a finished block is read once more, so that its tokens are remembered.
        slides: there are no blocks, but a window over the masks, and so no steps of a block.
    """

    name: ClassVar[str] = "none"
    together: ClassVar[bool] = False
    stores: ClassVar[bool] = False
    slides: ClassVar[bool] = False

    def traced(self) -> tuple[NoCache, float]:
        """The kind without the number that a compiled step takes instead, and that number."""
        return self, 0.0

    def default_rule(self) -> Rule:
        """The rule where a caller names none."""
        return TopQuota()

    def own_step(self, model: nnx.Module, layout: Any, numbers: Any) -> Callable | None:
        """The loop's step; None is the block-wise one."""
        del model, layout, numbers
        return None

    def update_frequency(self, state: Any, num_layers: int) -> np.ndarray | None:
        """Of each row, the part of layers' passes that computed all of it; None if not counted."""
        del state, num_layers
        return None

    def begin(
        self, model: nnx.Module, tokens: Int[Array, "B T"], prompt: Bool[Array, "B T"]
    ) -> Any:
        """The cache before the first step.

        Args:
            model: the merged module.
            tokens: the canvas.
            prompt: positions in blocks before the first that has a mask.
        """
        del model, tokens, prompt
        return ()

    def read(
        self, model: nnx.Module, ask: Ask, cache: Any, layout: Any
    ) -> tuple[Float[Array, "B W D"], Any]:
        """Activations at ``ask.places``, and the cache.

        Args:
            model: the merged module.
            ask: what is wanted.
            cache: as :meth:`begin` or the last call gave it.
            layout: what is static; see :class:`~.step.Layout`.
        """
        del layout
        hidden, _, _ = model.hidden_states(ask.tokens, segment_ids=ask.exists.astype(jnp.int32))
        return _pick(hidden, ask.places), cache


@dataclasses.dataclass(frozen=True)
class DualCache(NoCache):
    """One call of a block reads the whole canvas; the others the block's own positions.

    Everything else is remembered from that call. Source: Fast-dLLM (arXiv 2505.22618), DualCache.
    """

    name: ClassVar[str] = "dual"
    together: ClassVar[bool] = True

    def begin(self, model, tokens, prompt):
        """Room for the canvas."""
        return model.init_cache(*tokens.shape)

    def read(self, model, ask, cache, layout):
        """The whole canvas where a block begins, part of it elsewhere."""

        def whole(cache):
            empty = dataclasses.replace(cache, length=jnp.zeros_like(cache.length))
            exists = ask.exists.astype(jnp.int32)
            hidden, cache, _ = model.hidden_states(ask.tokens, empty, segment_ids=exists)
            return _pick(hidden, ask.places), cache

        def part(cache):
            return self._part(model, ask, cache, layout)

        return jax.lax.cond(ask.fresh, whole, part, cache)

    def _part(self, model, ask, cache, layout):
        return _at_places(model, ask, ask.own, ask.valid, cache, layout)


@dataclasses.dataclass(frozen=True)
class PrefixCache(DualCache):
    """Between whole canvases, everything from the block on is computed anew.

    What is before it is remembered. Source: Fast-dLLM (arXiv 2505.22618), PrefixCache.
    """

    name: ClassVar[str] = "prefix"

    def _part(self, model, ask, cache, layout):
        # Few widths are compiled: each half as many blocks as the one before.
        widths, left = [], layout.blocks
        while left:
            widths.append(left)
            left = left // 2

        def suffix(width):
            def run(cache):
                places, valid = places_of(ask.later, layout.reads(width * layout.block_length))
                return _at_places(model, ask, places, valid, cache, layout)

            return run

        needed = layout.blocks - ask.block
        index = sum((needed <= width).astype(jnp.int32) for width in widths) - 1
        return jax.lax.switch(index, [suffix(width) for width in widths], cache)


@dataclasses.dataclass(frozen=True)
class BlockCache(NoCache):
    """Of a block-causal model: earlier blocks are remembered as they are, and only the block read.

    Exact: a finished block is read once more, without masks, before the next.
    """

    name: ClassVar[str] = "block"
    stores: ClassVar[bool] = True

    def begin(self, model, tokens, prompt):
        """The prompt's whole blocks, read."""
        cache = model.init_cache(*tokens.shape)
        return model.hidden_states(tokens, cache, segment_ids=prompt.astype(jnp.int32))[1]

    def read(self, model, ask, cache, layout):
        """The block's own positions."""
        return _at_places(model, ask, ask.own, ask.valid, cache, layout)


def _pick(hidden: Float[Array, "B T D"], places: Int[Array, "B W"]) -> Float[Array, "B W D"]:
    return constrain(at(constrain(hidden, "batch", None, "embed"), places), "batch", "seq", "embed")


def _at_places(model, ask, places, valid, cache, layout):
    """Read the tokens at some places, whose keys and values are written over.

    Returns what is asked for, and the cache.
    """
    hidden, cache, _ = model.hidden_states(
        at(ask.tokens, places), cache, positions=places, segment_ids=valid.astype(jnp.int32)
    )
    hidden = constrain(hidden, "batch", None, "embed")
    if layout.shift:
        hidden = at(hidden, _index_of(ask.places, places))
    else:
        # Blocks go from left to right: the present one stands first.
        hidden = hidden[:, : ask.places.shape[1]]
    return constrain(hidden, "batch", "seq", "embed"), cache


def _index_of(wanted: Int[Array, "B W"], places: Int[Array, "B R"]) -> Int[Array, "B W"]:
    """Where each wanted position stands among a row's sorted ``places``; some place if nowhere."""

    def local(wanted, places):
        index = jax.vmap(jnp.searchsorted)(places, wanted)
        return jnp.minimum(index, places.shape[1] - 1).astype(jnp.int32)

    return kernel_map(local, (_ROWS, _ROWS), _ROWS)(wanted, places)
