"""Terms of models of tokens: they draw token by token, and know each one's probability."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..sharding import Params, constrain, kernel_map
from .brier import NGRAM, exact_terms, sampled_terms
from .walk import ROWS, fold, position_keys, units_at, walk


@dataclasses.dataclass(frozen=True, eq=False)
class TokenScorer:
    """The compiled terms of one structure of a next-token model.

    Attributes:
        graphdef: the model's structure.
        exact_last: the form: :func:`.brier.exact_terms`, or :func:`.brier.sampled_terms`.
    """

    graphdef: nnx.GraphDef
    exact_last: bool

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
        del lengths  # A start's n-gram is inside its document, and nothing after it is read.
        model = nnx.merge(self.graphdef, params)
        tokens, seeds = constrain(tokens, *ROWS), constrain(seeds, "batch")

        def visit(cache, start):
            keys = position_keys(seeds, start)
            # The token before the n-gram, which is still to be read, and the n-gram.
            text = units_at(tokens, start[:, None] - 1 + jnp.arange(NGRAM + 1))
            before, truth = text[:, 0], text[:, 1:]
            if self.exact_last:
                gold = probabilities_of(_logits(model, text[:, :-1], cache)[0], truth)
                return exact_terms(gold, *draw_path(model, cache, before, keys, 0))

            def path(draw):
                return draw_path(model, cache, before, keys, draw, alone=True)

            first, second = jax.lax.map(path, jnp.arange(2))
            return sampled_terms(first, second, truth)

        return walk(model, tokens, starts, visit, gap=gap)


def draw_path(
    model: nnx.Module,
    cache: Any,
    token: Int[Array, "B"],
    keys: PRNGKeyArray,
    draw: Any,
    *,
    alone: bool = False,
) -> Any:
    """Four tokens drawn from the model itself, one after another.

    Args:
        model: the merged module.
        cache: of the text but for its last token.
        token: the last.
        keys: of the places.
        draw: which of a place's draws this is, 0 or 1.
        alone: return what was drawn, nothing else.

    Returns:
        The tokens ``[B, 4]``; and unless ``alone`` what the other draw takes after the same tokens
        ``[B, 4]``, and the sum of all tokens' squared probabilities there ``[B, 4]``.
    """

    def step(carry, place):
        cache, token = carry
        logits, cache = _logits(model, token[:, None], cache)
        logits = logits[:, 0]

        def one(draw):
            drawn = jax.vmap(jax.random.categorical)(fold(keys, draw, place), logits)
            return constrain(drawn.astype(jnp.int32), "batch")

        mine = one(draw)
        if alone:
            return (cache, mine), mine
        squares = jnp.sum(jnp.square(jax.nn.softmax(logits, axis=-1)), axis=-1)
        return (cache, mine), (mine, one(1 - draw), squares)

    # Between steps the row's tokens lie as the batch does.
    token = constrain(token, "batch")
    drawn = jax.lax.scan(step, (cache, token), jnp.arange(NGRAM))[1]
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drawn)


def probabilities_of(
    logits: Float[Array, "B n V"], tokens: Int[Array, "B n"]
) -> Float[Array, "B n"]:
    """The probability of each of these tokens."""

    def local(logits, tokens):
        log_p = jax.nn.log_softmax(logits, axis=-1)
        return jnp.exp(jnp.take_along_axis(log_p, tokens[:, :, None], axis=-1)[:, :, 0])

    return kernel_map(local, (("batch", None, None), ROWS), ROWS)(logits, tokens)


def _logits(model, tokens, cache):
    """Float32, each row's vocabulary in one place."""
    logits, cache = model(tokens, cache)
    return constrain(logits.astype(jnp.float32), "batch", None, None), cache
