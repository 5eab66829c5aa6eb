"""Terms of next-vector models: they draw chunks of K tokens, and know no probability.

From ``K = 4`` on a chunk holds the n-gram: two draws after every chunk of the text are all. With
smaller chunks an n-gram takes ``s = ceil(4 / K)`` of them. What is right is told by draws after the
true text, for a later chunk matters only where the earlier ones were right; whether two draws
collide is told along the first one's own text, for a later chunk matters only where they agreed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..sharding import Params, constrain, kernel_map
from .brier import NGRAM, matches, sampled_terms
from .walk import ROWS, fold, position_keys, units_at, walk

# Starts whose draws are decoded at once: each has logits of 2 K tokens.
_TOGETHER = 16


@dataclasses.dataclass(frozen=True, eq=False)
class VectorScorer:
    """The compiled terms of one structure of a next-vector model.

    Attributes:
        graphdef: the model's structure.
    """

    graphdef: nnx.GraphDef

    @functools.cached_property
    def terms(self):
        """Jitted ``(params, tokens, lengths, starts, seeds, *, gap) -> [B, P, 4]`` float32."""
        return jax.jit(self._terms, static_argnames="gap")

    def _terms(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, "B"],
        starts: Int[Array, "B P"],
        seeds: Int[Array, "B"],
        *,
        gap: int,
    ) -> Float[Array, "B P 4"]:
        model = nnx.merge(self.graphdef, params)
        tokens, starts = constrain(tokens, *ROWS), constrain(starts, *ROWS)
        lengths, seeds = constrain(lengths, "batch"), constrain(seeds, "batch")
        if model.config.chunk_size >= NGRAM:
            return whole_terms(model, tokens, lengths, starts, seeds)
        return walked_terms(model, tokens, starts, seeds, gap=gap)


def whole_terms(
    model: nnx.Module,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    starts: Int[Array, "B P"],
    seeds: Int[Array, "B"],
) -> Float[Array, "B P 4"]:
    """Where a chunk holds the n-gram: all activations at once, two draws at each start.

    Args:
        model: the merged module.
        tokens: a document a row, padding after it; whole chunks.
        lengths: tokens of each document.
        starts: chunks, from 1 on.
        seeds: of the documents.
    """
    size = model.config.chunk_size
    exists = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    hidden = model(constrain(tokens, "batch", "seq"), segment_ids=exists)[0]

    def pick(hidden, places):
        return jnp.take_along_axis(hidden, places[:, :, None], axis=1)

    wide = ("batch", None, "embed")
    pick = kernel_map(pick, (wide, ROWS), wide)

    def piece(starts):
        keys = position_keys(seeds, starts * size)
        drawn = draw_pairs(model, pick(hidden, starts - 1), keys, 0)
        truth = units_at(tokens, starts, size).reshape(*starts.shape, size)
        return sampled_terms(*(x[..., :NGRAM] for x in (drawn[:, :, 0], drawn[:, :, 1], truth)))

    batch, count = starts.shape
    together = min(_TOGETHER, count)
    last = jnp.broadcast_to(starts[:, -1:], (batch, -count % together))
    padded = jnp.concatenate([starts, constrain(last, *ROWS)], axis=1)
    pieces = jnp.moveaxis(padded.reshape(batch, -1, together), 1, 0)
    terms = jnp.moveaxis(jax.lax.map(piece, pieces), 0, 1)
    return terms.reshape(batch, -1, NGRAM)[:, :count]


def walked_terms(
    model: nnx.Module,
    tokens: Int[Array, "B T"],
    starts: Int[Array, "B P"],
    seeds: Int[Array, "B"],
    *,
    gap: int,
) -> Float[Array, "B P 4"]:
    """Chunks of any size, continued through the cache; arguments as for :func:`whole_terms`.

    With one chunk to an n-gram the draws, and so the terms, are those of :func:`whole_terms`.
    """
    size = model.config.chunk_size
    chunks = -(-NGRAM // size)

    def visit(cache, start):
        keys = position_keys(seeds, start * size)
        # The chunk before the n-gram, which is still to be read, and the n-gram's.
        text = units_at(tokens, start[:, None] - 1 + jnp.arange(chunks + 1), size)
        truth = text[:, size : size + NGRAM]
        hidden = model(text[:, : chunks * size], cache)[0]
        steps = [draw_pairs(model, hidden[:, i : i + 1], keys, i) for i in range(chunks)]
        first, second = _joined(jnp.concatenate(steps, axis=1))
        right = matches(first, truth).astype(jnp.float32) + matches(second, truth)

        def step(carry, place):
            cache, chunk = carry
            hidden, cache = model(chunk, cache)
            pair = draw_pairs(model, hidden, keys, place)[:, 0]
            return (cache, constrain(pair[:, 0], *ROWS)), pair

        begin = constrain(text[:, :size], *ROWS)
        pairs = jax.lax.scan(step, (cache, begin), jnp.arange(chunks))[1]
        return right - matches(*_joined(jnp.moveaxis(pairs, 0, 1)))

    return walk(model, tokens, starts, visit, gap=gap, size=size)


def draw_pairs(
    model: nnx.Module, hidden: Float[Array, "B M D"], keys: PRNGKeyArray, step: int | Array
) -> Int[Array, "B M 2 K"]:
    """Two draws of the chunk after each activation.

    Args:
        model: the merged module.
        hidden: activations.
        keys: of the places, ``[B]`` for one activation a row, or ``[B, M]``.
        step: how many chunks the place is behind.
    """
    keys = keys[:, None] if keys.ndim == 1 else keys
    pair = jnp.stack([fold(keys, draw, step) for draw in range(2)], axis=2)
    one = functools.partial(model.latent_head.noise, shape=())
    noise = jax.vmap(jax.vmap(jax.vmap(one)))(pair)
    noise = noise.reshape(noise.shape[0], -1, *noise.shape[3:])
    drawn = model.tokens(model.draw(hidden, noise))
    return drawn.reshape(drawn.shape[0], -1, 2, drawn.shape[-1])


def _joined(pairs: Int[Array, "B s 2 K"]) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Both draws' first tokens, chunk after chunk."""
    flat = jnp.moveaxis(pairs, 2, 1)
    flat = flat.reshape(*flat.shape[:2], -1)[..., :NGRAM]
    return flat[:, 0], flat[:, 1]
